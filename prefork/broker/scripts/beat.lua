-- Take or renew a worker's lease on a queue, and tell it what it should know. In few commands: an idle worker sends this.
-- KEYS  1 leases  2 pending  3 ranked  4 scheduled  5 paused  6 active of the worker
-- ARGV  1 worker  2 lease in ms  3 "1" to take a lease, "0" to renew it
-- Returns  {server time in ms, next due in ms or -1, 0 if nothing waits, how many it holds, worker, end of its lease,
--          worker, end …}
-- Errors  FENCED: the lease to renew is gone
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ends, only = now + tonumber(ARGV[2]), ARGV[3] == '1' and 'CH' or 'XX'
if type(redis.pcall('ZADD', KEYS[1], only, ends, ARGV[1])) == 'table' then
  -- A server that is out of memory refuses what needs more, unless the script has written before: what has ended must
  -- be able to end, so that memory gets free.
  redis.call('ZREM', KEYS[1], '')
  redis.call('ZADD', KEYS[1], only, ends, ARGV[1])
end
local next_due = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')[2]
local waiting = redis.call('EXISTS', KEYS[2], KEYS[3])
if waiting > 0 and redis.call('EXISTS', KEYS[5]) == 1 then waiting = 0 end
local reply = {now, next_due and tonumber(next_due) or -1, waiting, redis.call('ZCARD', KEYS[6])}
local held = false
local leases = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do
  reply[#reply + 1] = leases[i]
  reply[#reply + 1] = tonumber(leases[i + 1])
  held = held or leases[i] == ARGV[1]
end
if not held then return redis.error_reply('FENCED the lease of ' .. ARGV[1] .. ' is gone') end
return reply
