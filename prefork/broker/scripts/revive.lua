-- Let dead letters run again: to the end of their queue, with all their chances, without the result that said FAILED.
-- KEYS  1 messages  2 state  3 pending  4 ranked  5 dead  6 wake  7 takeovers
-- ARGV  1 prefix of result keys  2 prefix of the marks of `cancel`; then ids
-- Returns  {how many of the ids it has looked at, how many of these were dead}: it stops when it has moved a quarter of
--          a megabyte, so that it never takes long
local looked, size = 0, 0
local revived, states, said, waiting, seen = {}, {}, {}, {}, {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local message = redis.call('HGET', KEYS[1], id)
  if message and redis.call('ZSCORE', KEYS[5], id) and not seen[id] then
    seen[id] = true
    local state = redis.call('HGET', KEYS[2], id)
    if state and #state > #'{}' then
      -- Of two values of one name in JSON the later one holds.
      states[#states + 1] = id
      states[#states + 1] = string.sub(state, 1, -2) .. ',"retried":0,"crashes":0,"unknown":0,"due_ms":0,"progress":null}'
    end
    local priority = tonumber(string.match(message, '^%d+ %d+ (%-?%d+) ')) or 0
    if priority == 0 then
      waiting[#waiting + 1] = id
    else
      redis.call('ZADD', KEYS[4], -priority, id)
    end
    revived[#revived + 1] = id
    said[#said + 1] = ARGV[1] .. id
    said[#said + 1] = ARGV[2] .. id
    size = size + #message + (state and #state or 0)
  end
  looked = looked + 1
  if size > 262144 then break end
end
if #states > 0 then redis.call('HSET', KEYS[2], unpack(states)) end
if #waiting > 0 then redis.call('RPUSH', KEYS[3], unpack(waiting)) end
if #revived > 0 then
  redis.call('ZREM', KEYS[5], unpack(revived)) -- not before they have another place, should the broker refuse that
  redis.call('UNLINK', unpack(said))
  redis.call('HDEL', KEYS[7], unpack(revived))
  redis.call('ZADD', KEYS[6], 0, '0')
end
return {looked, #revived}
