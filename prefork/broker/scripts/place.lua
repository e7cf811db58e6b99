-- Where one id stands, all of its places at one moment; and bring it into exactly one, if it has a message, else none.
-- KEYS  1 messages  2 pending  3 ranked  4 scheduled  5 dead  6 leases  7 wake
-- ARGV  1 id  2 "look" | "mend"  3 prefix of active keys; then workers that have no lease
-- Returns  {"message" | "cancelled" | "none", {its places as they were: pending, ranked, scheduled, dead, or a worker}}
local id, mend = ARGV[1], ARGV[2] == 'mend'
local message = redis.call('HGET', KEYS[1], id)
local is = not message and 'none' or message == '0 cancelled' and 'cancelled' or 'message'
local places, keys = {}, {}

local function look(key, name)
  local score = redis.call('ZSCORE', key, id)
  if score then
    places[#places + 1], keys[#keys + 1] = name, key
    return tonumber(score)
  end
end

-- What a living worker holds stays there, with the one that claimed last. Else what may run soon, rather than later, or
-- never: no task is lost for that.
local keep, claimed = nil, nil
local workers = redis.call('ZRANGE', KEYS[6], 0, -1)
for _, worker in ipairs(workers) do
  local score = look(ARGV[3] .. worker, worker)
  if score and (not claimed or score >= claimed) then keep, claimed = #places, score end
end
for _ = 1, #redis.call('LPOS', KEYS[2], id, 'COUNT', 2) do places[#places + 1], keys[#keys + 1] = 'pending', KEYS[2] end
look(KEYS[3], 'ranked')
look(KEYS[4], 'scheduled')
for i = 4, #ARGV do
  if not redis.call('ZSCORE', KEYS[6], ARGV[i]) then look(ARGV[3] .. ARGV[i], ARGV[i]) end
end
look(KEYS[5], 'dead')
keep = keep or 1
if not mend or (is ~= 'none' and #places == 1) then return {is, places} end

redis.call('ZREM', KEYS[6], '') -- lets a server that is out of memory do the rest
for i, key in ipairs(keys) do
  if is == 'none' or i ~= keep then
    if key == KEYS[2] then redis.call('LREM', key, -1, id) else redis.call('ZREM', key, id) end
  end
end
if is == 'cancelled' and #places == 0 then redis.call('HDEL', KEYS[1], id) end
if is == 'message' and #places == 0 then
  local priority = tonumber(string.match(message, '^%d+ %d+ (%-?%d+) ')) or 0
  if priority == 0 then
    redis.call('RPUSH', KEYS[2], id)
  else
    redis.call('ZADD', KEYS[3], -priority, id)
  end
  redis.call('ZADD', KEYS[7], 0, '0')
end
return {is, places}
