-- Count what a queue holds.
-- KEYS  1 messages  2 state  3 pending  4 ranked  5 scheduled  6 dead  7 leases  8 stats  9 paused
-- ARGV  1 prefix of active keys
-- Returns  {server time in ms, pending, scheduled, active, dead, paused, messages in all, stats as a flat list,
--           worker, end of its lease, worker, end … as a list, id, message and state of the next in line (or nothing)}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local active, leases = 0, redis.call('ZRANGE', KEYS[7], 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do active = active + redis.call('ZCARD', ARGV[1] .. leases[i]) end
local pending = redis.call('LLEN', KEYS[3]) + redis.call('ZCARD', KEYS[4])
local first = redis.call('LINDEX', KEYS[3], 0) or redis.call('ZRANGE', KEYS[4], 0, 0)[1]
local reply = {
  now, pending, redis.call('ZCARD', KEYS[5]), active, redis.call('ZCARD', KEYS[6]), redis.call('EXISTS', KEYS[9]),
  redis.call('HLEN', KEYS[1]), redis.call('HGETALL', KEYS[8]), leases,
}
if first then
  reply[10], reply[11], reply[12] = first, redis.call('HGET', KEYS[1], first), redis.call('HGET', KEYS[2], first)
end
return reply
