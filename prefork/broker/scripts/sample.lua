-- Look at up to n ids of each place, and of some workers: whether each has a message, and stands nowhere else.
-- KEYS  1 messages  2 pending  3 ranked  4 scheduled  5 dead  6 leases
-- ARGV  1 prefix of active keys  2 n  3 of how many workers
-- Returns  {how many were looked at, {ids without a message}, {ids in two places}}
local most = tonumber(ARGV[2]) - 1
local sets = {KEYS[3], KEYS[4], KEYS[5]}
for _, worker in ipairs(redis.call('ZRANGE', KEYS[6], 0, ARGV[3] - 1)) do sets[#sets + 1] = ARGV[1] .. worker end
local looked, bare, twice = 0, {}, {}
local listed = {}

local function look(id, own)
  looked = looked + 1
  if redis.call('HEXISTS', KEYS[1], id) == 0 then bare[#bare + 1] = id end
  for _, set in ipairs(sets) do
    if set ~= own and redis.call('ZSCORE', set, id) then
      twice[#twice + 1] = id
      return
    end
  end
end

for _, id in ipairs(redis.call('LRANGE', KEYS[2], 0, most)) do
  if listed[id] then twice[#twice + 1] = id end
  listed[id] = true
  look(id, '')
end
for _, set in ipairs(sets) do
  for _, id in ipairs(redis.call('ZRANGE', set, 0, most)) do look(id, set) end
end
return {looked, bare, twice}
