-- All that is known of one task.
-- KEYS  1 messages  2 state  3 leases  4 scheduled  5 dead  6 result
-- ARGV  1 id  2 prefix of active keys
-- Returns  {place, message, state, result record, worker, score in ms}; place is "" when nothing is known of it, else
--          "pending" | "scheduled" (score: due) | "active" (score: claimed) | "dead" (score: died) | "finished"
local id = ARGV[1]
local message, state, result = redis.call('HGET', KEYS[1], id), redis.call('HGET', KEYS[2], id), redis.call('GET', KEYS[6])
local place, worker, score = 'pending', '', '0'
if not message or message == '0 cancelled' then
  return {result and 'finished' or '', false, false, result, '', '0'}
end
local due, died = redis.call('ZSCORE', KEYS[4], id), redis.call('ZSCORE', KEYS[5], id)
if due then
  place, score = 'scheduled', due
elseif died then
  place, score = 'dead', died
else
  for _, name in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
    local claimed = redis.call('ZSCORE', ARGV[2] .. name, id)
    if claimed then place, worker, score = 'active', name, string.format('%.3f', claimed / 2048) end
  end
end
return {place, message, state, result, worker, score}
