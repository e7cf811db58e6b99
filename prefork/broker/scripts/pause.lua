-- Pause a queue, or let it go on: nothing is claimed from it while it is paused.
-- KEYS  1 paused  2 wake
-- ARGV  1 "1" to pause, "0" to go on
-- Returns  1 if that changed anything
redis.call('ZREM', KEYS[2], '') -- for a server that is out of memory, as in `settle`
if ARGV[1] == '1' then return redis.call('SETNX', KEYS[1], '1') end
local was = redis.call('DEL', KEYS[1])
redis.call('ZADD', KEYS[2], 0, '0')
return was
