-- Put another value into a field of a hash, or none, if it is the same still.
-- KEYS  1 the hash
-- ARGV  1 field  2 the value that was seen  3 "set" | "drop"  4 the new one
-- Returns  1 if it was, else 0
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
if ARGV[3] == 'set' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[4]) else redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
