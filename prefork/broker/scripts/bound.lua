-- Let a key expire that never would.
-- KEYS  1 the key
-- ARGV  1 ms
-- Returns  1 if it would not have, else 0
if redis.call('PTTL', KEYS[1]) ~= -1 then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
