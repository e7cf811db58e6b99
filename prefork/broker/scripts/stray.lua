-- Which of some histories are of messages that are not there; and forget them.
-- KEYS  1 messages  2 state
-- ARGV  1 "look" | "mend"; then ids
-- Returns  {ids}
local found = {}
for i = 2, #ARGV do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 0 and redis.call('HEXISTS', KEYS[2], ARGV[i]) == 1 then
    found[#found + 1] = ARGV[i]
  end
end
if ARGV[1] == 'mend' and #found > 0 then redis.call('HDEL', KEYS[2], unpack(found)) end
return found
