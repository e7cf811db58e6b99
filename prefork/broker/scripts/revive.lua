-- Let dead letters run again: to the end of their queue, with a new state, and without the result that said FAILED.
-- KEYS  1 messages  2 state  3 pending  4 ranked  5 dead  6 wake  7 takeovers
-- ARGV  1 prefix of result keys; then for each: id, state
-- Returns  how many; what is not dead any more is passed over
local revived = 0
for i = 2, #ARGV, 2 do
  local id = ARGV[i]
  local message = redis.call('HGET', KEYS[1], id)
  if message and redis.call('ZREM', KEYS[5], id) == 1 then
    redis.call('HSET', KEYS[2], id, ARGV[i + 1])
    redis.call('DEL', ARGV[1] .. id)
    redis.call('HDEL', KEYS[7], id)
    local priority = tonumber(string.match(message, '^%d+ %d+ (%-?%d+) ')) or 0
    if priority == 0 then
      redis.call('RPUSH', KEYS[3], id)
    else
      redis.call('ZADD', KEYS[4], -priority, id)
    end
    revived = revived + 1
  end
end
if revived > 0 then redis.call('ZADD', KEYS[6], 0, '0') end
return revived
