-- Accept messages: each once, however often it is sent.
-- KEYS  1 messages  2 pending  3 ranked  4 scheduled  5 wake
-- ARGV  1 prefix of result keys if this may be a repeat, else ""; then for each message: id, priority, when ("" now | "+ms" from now | "ms" since the epoch), header and body
-- Returns  {server time in ms, how many were new}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stamp = string.format('1 %.0f ', now)
local accepted = 0
local ready = {}
local woken = false
for i = 2, #ARGV, 4 do
  local id, priority, at = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  -- A repeat may come when the task has finished already: its result tells, if it keeps one.
  local finished = ARGV[1] ~= '' and redis.call('EXISTS', ARGV[1] .. id) == 1
  if not finished and redis.call('HSETNX', KEYS[1], id, stamp .. priority .. ' ' .. ARGV[i + 3]) == 1 then
    accepted = accepted + 1
    local due = 0
    if at ~= '' then
      due = string.sub(at, 1, 1) == '+' and now + tonumber(string.sub(at, 2)) or tonumber(at)
    end
    if due > now then
      local first = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
      redis.call('ZADD', KEYS[4], due, id)
      -- An idle master has to hear of it only if it is due before all that it knows of.
      woken = woken or not first[2] or due < tonumber(first[2])
    elseif priority == '0' then
      ready[#ready + 1] = id
      if #ready == 1000 then
        redis.call('RPUSH', KEYS[2], unpack(ready))
        ready = {}
      end
      woken = true
    else
      redis.call('ZADD', KEYS[3], -tonumber(priority), id)
      woken = true
    end
  end
end
if #ready > 0 then redis.call('RPUSH', KEYS[2], unpack(ready)) end
if woken then redis.call('ZADD', KEYS[5], 0, '0') end
return {now, accepted}
