-- Promote what should have been long ago, or is due at no time that will ever come.
-- KEYS  1 messages  2 pending  3 ranked  4 scheduled  5 wake  6 leases
-- ARGV  1 for how many ms it must have been due  2 the latest moment in ms  3 at most so many
-- Returns  how many
redis.call('ZREM', KEYS[6], '') -- lets a server that is out of memory do the rest
local time = redis.call('TIME')
local before = time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(ARGV[1])
local due = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', string.format('%.0f', before), 'LIMIT', 0, ARGV[3])
if #due == 0 then due = redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. ARGV[2], '+inf', 'LIMIT', 0, ARGV[3]) end
for _, id in ipairs(due) do
  redis.call('ZREM', KEYS[4], id)
  local message = redis.call('HGET', KEYS[1], id)
  if message then
    local priority = tonumber(string.match(message, '^%d+ %d+ (%-?%d+) ')) or 0
    if priority == 0 then
      redis.call('RPUSH', KEYS[2], id)
    else
      redis.call('ZADD', KEYS[3], -priority, id)
    end
  end
end
if #due > 0 then redis.call('ZADD', KEYS[5], 0, '0') end
return #due
