-- Make a dead letter of a message that nobody can read, if it is the same still, and waits.
-- KEYS  1 messages  2 state  3 pending  4 ranked  5 scheduled  6 dead  7 leases
-- ARGV  1 id  2 the message  3 its new state
-- Returns  1 if it is one now, else 0
redis.call('ZREM', KEYS[7], '') -- lets a server that is out of memory do the rest
local id = ARGV[1]
if redis.call('HGET', KEYS[1], id) ~= ARGV[2] then return 0 end
local from = redis.call('LREM', KEYS[3], 0, id) + redis.call('ZREM', KEYS[4], id) + redis.call('ZREM', KEYS[5], id)
if from == 0 then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[2], id, ARGV[3])
redis.call('ZADD', KEYS[6], time[1] * 1000 + math.floor(time[2] / 1000), id)
return 1
