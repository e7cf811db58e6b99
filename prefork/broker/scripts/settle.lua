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
local settled, processed, failed = 0, 0, 0
local woken, over = false, {}

-- What is over leaves no message and no history.
local function forget(ids)
  redis.call('HDEL', KEYS[3], unpack(ids))
  if redis.call('EXISTS', KEYS[4]) == 1 then redis.call('HDEL', KEYS[4], unpack(ids)) end
end

local n = tonumber(ARGV[7])
if n > 0 then
  local ids = {unpack(ARGV, 8, 7 + n)}
  local held = {}
  for i, claimed in ipairs(redis.call('ZMSCORE', KEYS[2], unpack(ids))) do
    if claimed then held[#held + 1] = ids[i] end
  end
  if #held > 0 then
    processed = redis.call('ZREM', KEYS[2], unpack(held))
    settled = processed
    forget(held)
  end
end

-- A repeat of a settlement whose reply was lost finds its messages gone from the active set, and passes over them.
local function release(id)
  if redis.call('ZREM', KEYS[2], id) == 0 then return false end
  settled = settled + 1
  return true
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
  redis.call('DEL', ARGV[4] .. id)
  redis.call('HINCRBY', KEYS[9], 'cancelled', 1)
  over[#over + 1] = id
  finish(id, ttl, record, 'FAILED')
  return true
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

local i = 8 + n
while ARGV[i] do
  local verb, id = ARGV[i], ARGV[i + 1]
  if verb == 'done' then
    if release(id) then
      processed = processed + 1
      over[#over + 1] = id
      finish(id, ARGV[i + 2], ARGV[i + 3], 'SUCCESSFUL')
    end
    i = i + 4
  elseif verb == 'retry' then
    if release(id) then
      if ARGV[i + 4] == '1' then processed, failed = processed + 1, failed + 1 end
      local priority = not is_cancelled(id) and priority_of(id)
      if priority then
        redis.call('HSET', KEYS[4], id, ARGV[i + 3])
        local delay = tonumber(ARGV[i + 2])
        if delay > 0 then schedule(id, now + delay) else push(id, priority, false) end
      end
    end
    i = i + 5
  elseif verb == 'back' then
    if release(id) then
      local priority = not is_cancelled(id) and priority_of(id)
      if priority then
        if ARGV[i + 2] ~= '' then redis.call('HSET', KEYS[4], id, ARGV[i + 2]) end
        push(id, priority, true)
      end
    end
    i = i + 3
  elseif verb == 'dead' then
    if release(id) then
      processed, failed = processed + 1, failed + 1
      bury(id, ARGV[i + 2])
      finish(id, ARGV[i + 3], ARGV[i + 4], 'FAILED')
    end
    i = i + 5
  elseif verb == 'drop' then
    if release(id) then
      over[#over + 1] = id
      redis.call('HINCRBY', KEYS[9], ARGV[i + 4], 1)
      finish(id, ARGV[i + 2], ARGV[i + 3], 'FAILED')
    end
    i = i + 5
  elseif verb == 'state' then
    if redis.call('ZSCORE', KEYS[2], id) then redis.call('HSET', KEYS[4], id, ARGV[i + 2]) end
    i = i + 3
  else -- follow
    local child, priority, at = ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
    if redis.call('ZSCORE', KEYS[2], id)
      and redis.call('HSETNX', KEYS[3], child, string.format('1 %.0f ', now) .. priority .. ' ' .. ARGV[i + 5]) == 1 then
      local due = 0
      if at ~= '' then
        due = string.sub(at, 1, 1) == '+' and now + tonumber(string.sub(at, 2)) or tonumber(at)
      end
      if due > now then schedule(child, due) else push(child, tonumber(priority), false) end
    end
    i = i + 6
  end
end

if #over > 0 then forget(over) end
if processed > 0 then redis.call('HINCRBY', KEYS[9], 'processed', processed) end
if failed > 0 then redis.call('HINCRBY', KEYS[9], 'failed', failed) end
if woken then redis.call('ZADD', KEYS[10], 0, '0') end
return {now, settled}
