-- Cancel a message that has not been claimed, or ask the worker that holds it to stop it.
-- KEYS  1 messages  2 state  3 leases  4 scheduled  5 ranked  6 dead  7 stats  8 pending
-- ARGV  1 id  2 prefix of active keys  3 result key  4 channel  5 result_ttl in ms  6 result record
--       7 prefix of the keys of requests, or "" to ask nobody  8 key of its mark  9 result record of one that ran
--       10 "again" if this may be a repeat: the very same record says that it is what it had cancelled
-- Returns  "cancelled" | "running": a worker holds it | "asked": the same, and it is told to stop it
--          | "finished": it is not there, or a dead letter
redis.call('ZREM', KEYS[3], '') -- for a server that is out of memory, as in `settle`
local id = ARGV[1]
local message = redis.call('HGET', KEYS[1], id)
if ARGV[10] == 'again' and redis.call('GET', ARGV[3]) == ARGV[6] then return 'cancelled' end
if not message or message == '0 cancelled' or redis.call('ZSCORE', KEYS[6], id) then return 'finished' end
for _, worker in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  if redis.call('ZSCORE', ARGV[2] .. worker, id) then
    if ARGV[7] == '' then return 'running' end
    redis.call('ZADD', ARGV[7] .. worker, 0, 'cancel ' .. id)
    redis.call('PEXPIRE', ARGV[7] .. worker, 60000)
    redis.call('SET', ARGV[8], ARGV[5] .. ' ' .. ARGV[9], 'PX', 86400000) -- should the worker die: see `restore`
    return 'asked'
  end
end
redis.call('HDEL', KEYS[2], id)
local stands = redis.call('ZREM', KEYS[4], id) + redis.call('ZREM', KEYS[5], id) == 0
if stands and redis.call('LLEN', KEYS[8]) <= 10000 then stands = redis.call('LREM', KEYS[8], 1, id) == 0 end
if stands then
  redis.call('HSET', KEYS[1], id, '0 cancelled') -- too far to look for: `claim` passes over it, and forgets it
else
  redis.call('HDEL', KEYS[1], id)
end
redis.call('HINCRBY', KEYS[7], 'cancelled', 1)
if ARGV[5] ~= '0' then redis.call('SET', ARGV[3], ARGV[6], 'PX', ARGV[5]) end
redis.pcall('PUBLISH', ARGV[4], 'FAILED') -- a user may lack the channels
return 'cancelled'
