-- Promote what is due, then hand up to n messages to a worker: higher priorities first, then first in first out.
-- KEYS  1 leases  2 active of the worker  3 messages  4 state  5 pending  6 ranked  7 scheduled  8 wake  9 paused
--       10 idle
-- ARGV  1 worker  2 n (0: promote only, and wake another)  3 number of this claim  4 how many it has children for that
--       have nothing to do: if it finds fewer, `enqueue` may hand the worker one more, until its next claim
-- Returns  {server time in ms, next due in ms or -1, how many are left, {ids}, {messages}, {states or nothing}}
-- Errors  FENCED: the worker's lease is gone, another has taken over what it held
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  return redis.error_reply('FENCED the lease of ' .. ARGV[1] .. ' is gone')
end
-- A server that is out of memory refuses what needs more, unless the script has written before: what has ended must be
-- able to end, so that memory gets free.
redis.call('ZREM', KEYS[10], ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- What a script reads is copied, and nobody else is served meanwhile: so not more than that in one claim, but at least
-- one message. How many fit is guessed from the mean of those before; what doesn't fit stays where it is.
local MOST_BYTES, MOST_DUE, SLICE = 786432, 256, 64
local function fitting(count, bytes)
  if count == 0 then return 1 end
  return math.max(1, math.min(SLICE, 16 + 4 * count, math.floor((MOST_BYTES - bytes) * count / (bytes + 1))))
end

local promoted, read = 0, 0
while promoted < MOST_DUE and read < MOST_BYTES do
  local some = math.min(MOST_DUE - promoted, fitting(promoted, read))
  local due = redis.call('ZRANGEBYSCORE', KEYS[7], '-inf', now, 'LIMIT', 0, some)
  if #due == 0 then break end
  local ready = {}
  local messages = redis.call('HMGET', KEYS[3], unpack(due))
  for i = 1, #due do
    if messages[i] then
      read = read + #messages[i]
      local priority = tonumber(string.match(messages[i], '^%d+ %d+ (%-?%d+) ')) or 0
      if priority == 0 then
        ready[#ready + 1] = due[i]
      else
        redis.call('ZADD', KEYS[6], -priority, due[i])
      end
    end
  end
  if #ready > 0 then redis.call('RPUSH', KEYS[5], unpack(ready)) end
  redis.call('ZREM', KEYS[7], unpack(due))
  promoted = promoted + #due
end
local next_due = redis.call('ZRANGE', KEYS[7], 0, 0, 'WITHSCORES')[2]
next_due = next_due and tonumber(next_due) or -1

if redis.call('EXISTS', KEYS[9]) == 1 then return {now, next_due, 0, {}, {}, {}} end

local n = tonumber(ARGV[2])
local ids, messages = {}, {}
local looked, bytes = 0, 0

local function wanted()
  -- Those that were cancelled count too: there may be a hundred thousand of them.
  if #ids >= n or bytes >= MOST_BYTES or looked >= n + 500 then return 0 end
  return math.min(n - #ids, fitting(looked, bytes))
end

local function keep(taken)
  if #taken == 0 then return false end
  local found = redis.call('HMGET', KEYS[3], unpack(taken))
  local k = #ids
  for i = 1, #taken do
    local message = found[i]
    if message == '0 cancelled' then
      redis.call('HDEL', KEYS[3], taken[i])
    elseif message then -- those that aren't there were cancelled
      k = k + 1
      ids[k] = taken[i]
      messages[k] = message
      bytes = bytes + #message
    end
  end
  looked = looked + #taken
  return wanted() > 0
end

-- What is taken stays where it is until it is active: what the broker refuses in the middle is rather in two places than
-- in none.
local from_ranked, from_pending = {}, 0
local function take_ranked(from, to)
  local offset, more = 0, nil
  repeat
    local taken = redis.call('ZRANGEBYSCORE', KEYS[6], from, to, 'LIMIT', offset, wanted())
    offset = offset + #taken
    for _, id in ipairs(taken) do from_ranked[#from_ranked + 1] = id end
    more = keep(taken)
  until not more
end

if n > 0 then
  local ranked = redis.call('EXISTS', KEYS[6]) == 1
  if ranked then take_ranked('-inf', '(0') end
  while wanted() > 0 do
    local taken = redis.call('LRANGE', KEYS[5], from_pending, from_pending + wanted() - 1)
    from_pending = from_pending + #taken
    if not keep(taken) then break end
  end
  if ranked and wanted() > 0 then take_ranked('(0', '+inf') end
end

local states = {}
if from_pending > 0 then redis.call('LTRIM', KEYS[5], 0, -1) end -- whether that is permitted, while nothing is changed
if #ids > 0 then
  local active = {}
  -- Keeps their order for `restore`, also that of claims within a millisecond: a claim takes longer than its steps.
  -- Whole numbers, which the server reads and writes several times faster than fractions.
  local exact = now * 2048 + math.floor(time[2] % 1000 * 2.048)
  for i = 1, #ids do
    active[2 * i - 1] = exact + i
    active[2 * i] = ids[i]
  end
  redis.call('ZADD', KEYS[2], unpack(active))
end
if #from_ranked > 0 then redis.call('ZREM', KEYS[6], unpack(from_ranked)) end
if from_pending > 0 then redis.call('LTRIM', KEYS[5], from_pending, -1) end
if #ids > 0 and redis.call('EXISTS', KEYS[4]) == 1 then states = redis.call('HMGET', KEYS[4], unpack(ids)) end

if #ids < tonumber(ARGV[4]) then redis.call('ZADD', KEYS[10], ARGV[3], ARGV[1]) end

local left = redis.call('LLEN', KEYS[5]) + redis.call('ZCARD', KEYS[6])
if left > 0 then
  redis.call('ZADD', KEYS[8], 0, '0') -- for another idle master
else
  redis.call('DEL', KEYS[8])
end
return {now, next_due, left, ids, messages, states}
