-- Where some ids stand now, but for the list of what is pending, in which nothing can be found quickly.
-- KEYS  1 messages  2 ranked  3 scheduled  4 dead  5 leases
-- ARGV  1 prefix of active keys  2 n, then n workers that have no lease; then the ids
-- Returns  for each id: 1 if it has a message, else 0; in how many places it is
local n = tonumber(ARGV[2])
local sets = {KEYS[2], KEYS[3], KEYS[4]}
for _, worker in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do sets[#sets + 1] = ARGV[1] .. worker end
for i = 3, 2 + n do
  if not redis.call('ZSCORE', KEYS[5], ARGV[i]) then sets[#sets + 1] = ARGV[1] .. ARGV[i] end
end
local told = {}
for i = 3 + n, #ARGV do
  local places = 0
  for _, set in ipairs(sets) do
    if redis.call('ZSCORE', set, ARGV[i]) then places = places + 1 end
  end
  told[#told + 1] = redis.call('HEXISTS', KEYS[1], ARGV[i])
  told[#told + 1] = places
end
return told
