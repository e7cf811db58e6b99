-- Delete a message that nobody runs, with all that is known of it.
-- KEYS  1 messages  2 state  3 pending  4 ranked  5 scheduled  6 dead  7 leases  8 result  9 stats
-- ARGV  1 id  2 prefix of active keys
-- Returns  "deleted" | "running": a worker holds it | "": nothing is known of it
redis.call('ZREM', KEYS[7], '') -- lets a server that is out of memory do the rest
local id = ARGV[1]
for _, worker in ipairs(redis.call('ZRANGE', KEYS[7], 0, -1)) do
  if redis.call('ZSCORE', ARGV[2] .. worker, id) then return 'running' end
end
local result = redis.call('DEL', KEYS[8])
local message = redis.call('HGET', KEYS[1], id)
if not message or message == '0 cancelled' then return result == 1 and 'deleted' or '' end
redis.call('HDEL', KEYS[2], id)
local placed = redis.call('ZREM', KEYS[4], id) + redis.call('ZREM', KEYS[5], id) + redis.call('ZREM', KEYS[6], id)
if placed == 0 and redis.call('LLEN', KEYS[3]) <= 10000 then placed = redis.call('LREM', KEYS[3], 1, id) end
if placed > 0 then
  redis.call('HDEL', KEYS[1], id)
else
  redis.call('HSET', KEYS[1], id, '0 cancelled') -- too far to look for: `claim` passes over it, and forgets it
end
redis.call('HINCRBY', KEYS[9], 'deleted', 1)
return 'deleted'
