-- Move what a worker holds back to the front of its queue, in the order in which it was claimed; what was to be cancelled
-- is over.
-- KEYS  1 leases  2 active of that worker  3 messages  4 pending  5 ranked  6 wake  7 takeovers  8 state  9 dead
--       10 stats  11 idle
-- ARGV  1 that worker
--       2 "left": it leaves by itself, take its lease away | "gone": it has died | "expired": the same, if its lease has
--         ended | "unmoved": the same, if it still ends when 7 says (this clock has gone back since) | "keep": it lives,
--         and holds only the ids that follow
--       3 max_takeovers  4 prefix of channels  5 prefix of result keys  6 prefix of the marks of `cancel`; then ids to
--         keep
-- Returns  how many were moved; {how many, how many of them are dead letters now} if some are; -1 if its lease has not
--          ended
if ARGV[2] == 'expired' then
  local time = redis.call('TIME')
  local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
  if ends and tonumber(ends) > time[1] * 1000 + math.floor(time[2] / 1000) then return -1 end
end
if ARGV[2] == 'unmoved' and tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0) ~= tonumber(ARGV[7]) then
  return -1
end
-- A server that is out of memory refuses what needs more, unless the script has written before: what has ended must be
-- able to end, so that memory gets free.
redis.call('ZREM', KEYS[1], '')
redis.call('ZREM', KEYS[11], ARGV[1])
local kept = {}
if ARGV[2] == 'keep' then
  for i = 7, #ARGV do kept[ARGV[i]] = true end
end

-- What takes the whole worker down, each time, is found by the count of its takeovers alone: nobody lives to tell which
-- task it was.
local charged = ARGV[2] == 'gone' or ARGV[2] == 'expired' or ARGV[2] == 'unmoved'

local function bury(id)
  local known, state = pcall(cjson.decode, redis.call('HGET', KEYS[8], id) or '{}')
  if not known or type(state) ~= 'table' then state = {} end
  if type(state.errors) ~= 'table' then state.errors = {} end
  table.insert(state.errors, {
    class = 'prefork.WorkerDied', traceback = '',
    message = 'held by a worker that died, ' .. ARGV[3] .. ' times; the last one was ' .. ARGV[1],
  })
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[8], id, cjson.encode(state))
  redis.call('ZADD', KEYS[9], time[1] * 1000 + math.floor(time[2] / 1000), id)
  redis.call('HDEL', KEYS[7], id)
  redis.pcall('PUBLISH', ARGV[4] .. id, 'FAILED')
end

local function is_cancelled(id, mark)
  local ttl, record = string.match(mark or '', '^(%d+) (.*)$')
  if not ttl then return false end
  if ttl ~= '0' then redis.call('SET', ARGV[5] .. id, record, 'PX', ttl) end
  redis.call('HDEL', KEYS[8], id)
  redis.call('HDEL', KEYS[3], id)
  redis.call('DEL', ARGV[6] .. id)
  redis.pcall('HINCRBY', KEYS[10], 'cancelled', 1)
  redis.pcall('PUBLISH', ARGV[4] .. id, 'FAILED')
  return true
end

local slice = 500 -- words of one command
local function each_slice(ids, act)
  for first = 1, #ids, slice do act(unpack(ids, first, math.min(first + slice - 1, #ids))) end
end

local held = redis.call('ZRANGE', KEYS[2], 0, -1)
local leaving, marks, front, ranked, poison, gone = {}, {}, {}, {}, {}, {}
for i = #held, 1, -1 do
  if not kept[held[i]] then
    leaving[#leaving + 1] = held[i]
    marks[#marks + 1] = ARGV[6] .. held[i]
  end
end
local asked, deaths = {}, {}
each_slice(marks, function(...)
  for _, mark in ipairs(redis.call('MGET', ...)) do asked[#asked + 1] = mark end
end)
if charged then
  each_slice(leaving, function(...)
    for _, times in ipairs(redis.call('HMGET', KEYS[7], ...)) do deaths[#deaths + 1] = tonumber(times or 0) or 0 end
  end)
end
local times, priorities = {}, {}
for i, id in ipairs(leaving) do
  local message = redis.call('HGET', KEYS[3], id)
  times[id] = (deaths[i] or 0) + 1
  if not message or is_cancelled(id, asked[i]) then
    gone[#gone + 1] = id
  elseif charged and times[id] >= tonumber(ARGV[3]) then
    poison[#poison + 1] = id
  else
    priorities[id] = tonumber(string.match(message, '^%d+ %d+ (%-?%d+) ')) or 0
    if priorities[id] == 0 then front[#front + 1] = id else ranked[#ranked + 1] = id end
  end
end

-- If the server breaks this off, what has moved is charged, and does not move again.
local function left(...)
  redis.call('ZREM', KEYS[2], ...)
  if not charged then return end
  local counts = {}
  for _, id in ipairs({...}) do counts[#counts + 1], counts[#counts + 2] = id, times[id] end
  redis.call('HSET', KEYS[7], unpack(counts))
  redis.call('PEXPIRE', KEYS[7], 604800000)
end
local moved = #front + #ranked
if moved > 0 then redis.call('ZADD', KEYS[6], 0, '0') end
each_slice(gone, function(...) redis.call('ZREM', KEYS[2], ...) end)
each_slice(front, function(...)
  redis.call('LPUSH', KEYS[4], ...)
  left(...)
end)
each_slice(ranked, function(...)
  local scores = {}
  for _, id in ipairs({...}) do scores[#scores + 1], scores[#scores + 2] = -priorities[id], id end
  redis.call('ZADD', KEYS[5], unpack(scores))
  left(...)
end)
for _, id in ipairs(poison) do
  bury(id)
  redis.call('ZREM', KEYS[2], id)
end
-- Last, so that it is still taken over from if the server breaks this off.
if ARGV[2] ~= 'keep' then redis.call('ZREM', KEYS[1], ARGV[1]) end
if #poison > 0 then return {moved + #poison, #poison} end
return moved
