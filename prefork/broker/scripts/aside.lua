-- Put a key aside that has another type than it should have. What it holds is kept for a while, for people to look at.
-- KEYS  1 the key  2 where to
-- ARGV  1 the type that it should have  2 for how many ms it is kept
-- Returns  1 if it was put aside, else 0
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' or kind == ARGV[1] then return 0 end
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
