-- Look at some of the keys of a prefix: which there are, of which type, and when they expire.
-- KEYS  none: it looks for them
-- ARGV  1 cursor  2 pattern  3 how many to look at  4 prefix and ":"
-- Returns  {next cursor, how many were looked at, {key, type, ms until it expires or -1, …}}; results that are as they
--          should be are only counted: there may be millions
local reply = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
local told = {}
for _, key in ipairs(reply[2]) do
  local kind, left = redis.call('TYPE', key).ok, redis.call('PTTL', key)
  local is_result = string.match(string.sub(key, #ARGV[4] + 1), '^{.-}:r:')
  if kind ~= 'none' and not (is_result and kind == 'string' and left >= 0) then
    told[#told + 1], told[#told + 2], told[#told + 3] = key, kind, left
  end
end
return {reply[1], #reply[2], told}
