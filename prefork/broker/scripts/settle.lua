-- Settle what a worker holds: a batch of outcomes, each once, with the follow-ups of those that succeeded.
-- KEYS  1 leases  2 active of the worker  3 messages  4 state  5 pending  6 ranked  7 scheduled  8 dead  9 stats
--       10 wake
-- ARGV  1 worker  2 prefix of result keys  3 prefix of channels  4 prefix of the marks of `cancel`  5 dead_max
--       6 dead_ttl in ms  7 n, then n ids that are done and keep no result; then records, each a verb and its fields:
--         done   id  result_ttl in ms  result record
--         retry  id  delay in ms  state  "1" if the attempt failed; what was to be cancelled is over, in place of this
--         back   id  state or ""                        to the front of its queue; likewise
--         dead   id  state  result_ttl in ms  result record
--         drop   id  result_ttl in ms  result record  counter     finished without a run
--         state  id  state                              progress of one that runs on
--         follow parent  id  priority  when  message    goes before the parent's `done`; see enqueue.lua
-- Returns  {server time in ms, how many left the active set}
-- Errors  FENCED: the worker's lease is gone; nothing was done
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  return redis.error_reply('FENCED the lease of ' .. ARGV[1] .. ' is gone')
end
-- A server that is out of memory refuses what needs more, unless the script has written before: what has ended must be
-- able to end, so that memory gets free.
redis.call('ZREM', KEYS[1], '')
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local settled = 0
local woken, over, marks, left = false, {}, {}, {}
local placed_counts, over_counts = {}, {} -- counters, of what has another place and of what is over
local function count(counts, name, n)
  counts[name] = (counts[name] or 0) + n
end

-- What is over leaves no message and no history. All leave the active set last: what the broker refuses in the middle (a
-- key of the wrong type, a right that is missing) is still held, and settled when it is said again.
local function forget(ids)
  redis.call('HDEL', KEYS[3], unpack(ids))
  if redis.call('EXISTS', KEYS[4]) == 1 then redis.call('HDEL', KEYS[4], unpack(ids)) end
  return redis.call('ZREM', KEYS[2], unpack(ids))
end

local n = tonumber(ARGV[7])
if n > 0 then
  local ids = {unpack(ARGV, 8, 7 + n)}
  local held = {}
  for i, claimed in ipairs(redis.call('ZMSCORE', KEYS[2], unpack(ids))) do
    if claimed then held[#held + 1] = ids[i] end
  end
  if #held > 0 then
    settled = forget(held)
    count(placed_counts, 'processed', settled)
  end
end

-- A repeat of a settlement whose reply was lost finds its messages gone from the active set, and passes over them.
local function holds(id)
  return not left[id] and redis.call('ZSCORE', KEYS[2], id)
end

local function ends(id)
  over[#over + 1] = id
  left[id] = true
  settled = settled + 1
end

local function placed(id)
  redis.call('ZREM', KEYS[2], id)
  left[id] = true
  settled = settled + 1
end

local function push(id, priority, front)
  woken = true
  if priority ~= 0 then
    redis.call('ZADD', KEYS[6], -priority, id)
  elseif front then
    redis.call('LPUSH', KEYS[5], id)
  else
    redis.call('RPUSH', KEYS[5], id)
  end
end

local function priority_of(id)
  local message = redis.call('HGET', KEYS[3], id)
  return message and (tonumber(string.match(message, '^%d+ %d+ (%-?%d+) ')) or 0)
end

local function schedule(id, due)
  local first = redis.call('ZRANGE', KEYS[7], 0, 0, 'WITHSCORES')[2]
  redis.call('ZADD', KEYS[7], due, id)
  woken = woken or not first or due < tonumber(first)
end

local function finish(id, ttl, record, status)
  if ttl ~= '0' then redis.call('SET', ARGV[2] .. id, record, 'PX', ttl) end
  redis.pcall('PUBLISH', ARGV[3] .. id, status) -- who waits looks again by itself; a user may lack the channels
end

-- Its worker had decided what becomes of it when it was told to stop it.
local function is_cancelled(id)
  local ttl, record = string.match(redis.call('MGET', ARGV[4] .. id)[1] or '', '^(%d+) (.*)$')
  if not ttl then return false end
  finish(id, ttl, record, 'FAILED')
  marks[#marks + 1] = ARGV[4] .. id
  count(over_counts, 'cancelled', 1)
  ends(id)
  return true
end

local function follow(id, priority, at, message)
  local due = 0
  if at ~= '' then
    due = string.sub(at, 1, 1) == '+' and now + tonumber(string.sub(at, 2)) or tonumber(at)
  end
  if redis.call('HSETNX', KEYS[3], id, string.format('1 %.0f ', now) .. priority .. ' ' .. message) == 0 then return end
  local taken, why
  if due > now then
    taken, why = pcall(schedule, id, due)
  else
    taken, why = pcall(push, id, tonumber(priority), false)
  end
  if not taken then
    redis.call('HDEL', KEYS[3], id) -- or the repeat would find it there, in no place
    error(why, 0)
  end
end

local function bury(id, state)
  redis.call('HSET', KEYS[4], id, state)
  redis.call('ZADD', KEYS[8], now, id)
  local surplus = redis.call('ZCARD', KEYS[8]) - tonumber(ARGV[5])
  local gone = redis.call('ZRANGEBYSCORE', KEYS[8], '-inf', now - tonumber(ARGV[6]), 'LIMIT', 0, 100)
  if #gone < surplus then gone = redis.call('ZRANGE', KEYS[8], 0, math.min(surplus, 100) - 1) end
  if #gone > 0 then
    redis.call('ZREM', KEYS[8], unpack(gone))
    redis.call('HDEL', KEYS[3], unpack(gone))
    redis.call('HDEL', KEYS[4], unpack(gone))
  end
end

local function settle(verb, id, i)
  if not holds(id) then return end
  if verb == 'done' then
    finish(id, ARGV[i + 2], ARGV[i + 3], 'SUCCESSFUL')
    count(over_counts, 'processed', 1)
    ends(id)
  elseif verb == 'retry' then
    local counts = placed_counts
    if is_cancelled(id) then
      counts = over_counts
    else
      local priority, delay = priority_of(id), tonumber(ARGV[i + 2])
      if priority then
        redis.call('HSET', KEYS[4], id, ARGV[i + 3])
        if delay > 0 then schedule(id, now + delay) else push(id, priority, false) end
      end
      placed(id)
    end
    if ARGV[i + 4] == '1' then
      count(counts, 'processed', 1)
      count(counts, 'failed', 1)
    end
  elseif verb == 'back' then
    if is_cancelled(id) then return end
    local priority = priority_of(id)
    if priority then
      if ARGV[i + 2] ~= '' then redis.call('HSET', KEYS[4], id, ARGV[i + 2]) end
      push(id, priority, true)
    end
    placed(id)
  elseif verb == 'dead' then
    bury(id, ARGV[i + 2])
    finish(id, ARGV[i + 3], ARGV[i + 4], 'FAILED')
    placed(id)
    count(placed_counts, 'processed', 1)
    count(placed_counts, 'failed', 1)
  elseif verb == 'drop' then
    finish(id, ARGV[i + 2], ARGV[i + 3], 'FAILED')
    count(over_counts, ARGV[i + 4], 1)
    ends(id)
  elseif verb == 'state' then
    redis.call('HSET', KEYS[4], id, ARGV[i + 2])
  else
    follow(ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5])
  end
end

local words = {done = 4, retry = 5, back = 3, dead = 5, drop = 5, state = 3, follow = 6}
local i, refused = 8 + n, nil
while ARGV[i] do
  local taken, why = pcall(settle, ARGV[i], ARGV[i + 1], i)
  if not taken then
    refused = refused or why
    left[ARGV[i + 1]] = true -- with its follow-ups refused it is not done
  end
  i = i + words[ARGV[i]]
end

local function tell(counts)
  for name, n in pairs(counts) do redis.pcall('HINCRBY', KEYS[9], name, n) end -- which must not hold up an outcome
end
tell(placed_counts)
if #over > 0 then
  local taken, why = pcall(forget, over)
  if taken then
    tell(over_counts)
    if #marks > 0 then redis.pcall('DEL', unpack(marks)) end -- they expire
  else
    refused = refused or why
  end
end
if woken then redis.call('ZADD', KEYS[10], 0, '0') end
if refused then error(refused, 0) end
return {now, settled}
