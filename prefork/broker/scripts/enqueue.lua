-- Accept messages: each once, however often it is sent.
-- KEYS  1 messages  2 pending  3 ranked  4 scheduled  5 wake  6 idle  7 paused
-- ARGV  1 prefix of result keys if this may be a repeat, else ""  2 prefix of active keys  3 prefix of inboxes; then for
--       each message: id, priority, when ("" now | "+ms" from now | "ms" since the epoch), header and body
-- Returns  {server time in ms, how many were new}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stamp = string.format('1 %.0f ', now)
local accepted = 0
local ready = {}
local woken = false

-- What the broker refuses in the middle (a key of the wrong type, a right that is missing) is not accepted: a message
-- that is stored and in no place would never run. An id without a message is passed over by `claim`.
local stored, refused = {}, nil
local function try(...)
  local said = redis.pcall(...)
  if type(said) == 'table' and said.err then refused = refused or said end
  return said
end
local function take_out()
  for _, id in ipairs(stored) do redis.pcall('HDEL', KEYS[1], id) end
  return refused
end

-- A single message that finds nothing before it goes straight to a worker that waits for one: it is active there from
-- now on, and travels with the wake-up. PUBLISH tells whether that worker is still connected; who takes a worker over
-- takes it out of `idle` too. A user who may not do this has the message claimed: it is stored by now, and no error may
-- leave it in no place.
local function handed_over(id, message)
  if #ARGV > 7 or redis.pcall('EXISTS', KEYS[2], KEYS[3], KEYS[7]) ~= 0 then return false end
  while true do
    local idle = redis.pcall('ZPOPMIN', KEYS[6])
    local worker = idle[1]
    if not worker then return false end
    local active = ARGV[2] .. worker
    if redis.pcall('ZADD', active, now * 2048 + math.floor(time[2] % 1000 * 2.048), id) == 1 then
      local heard = redis.pcall('PUBLISH', ARGV[3] .. worker, idle[2] .. ' ' .. #id .. ' ' .. id .. message)
      if type(heard) == 'number' and heard > 0 then return true end
      try('ZREM', active, id)
      if refused then return true end
    end
  end
end

for i = 4, #ARGV, 4 do
  local id, priority, at = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  -- A repeat may come when the task has finished already: its result tells, if it keeps one.
  local finished = ARGV[1] ~= '' and redis.call('EXISTS', ARGV[1] .. id) == 1
  local message = not finished and stamp .. priority .. ' ' .. ARGV[i + 3]
  if message and redis.call('HSETNX', KEYS[1], id, message) == 1 then
    accepted = accepted + 1
    stored[accepted] = id
    local due = 0
    if at ~= '' then
      due = string.sub(at, 1, 1) == '+' and now + tonumber(string.sub(at, 2)) or tonumber(at)
    end
    if due > now then
      local first = try('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
      try('ZADD', KEYS[4], due, id)
      -- An idle master has to hear of it only if it is due before all that it knows of.
      woken = woken or not first[2] or due < tonumber(first[2])
    elseif handed_over(id, message) then
      woken = false
    elseif priority == '0' then
      ready[#ready + 1] = id
      woken = true
    else
      try('ZADD', KEYS[3], -tonumber(priority), id)
      woken = true
    end
    if refused then return take_out() end
  end
end
if woken then try('ZADD', KEYS[5], 0, '0') end
for first = 1, #ready, 1000 do
  -- Last, since a repeat of what is refused behind it would have the ids there once more.
  if not refused then try('RPUSH', KEYS[2], unpack(ready, first, math.min(first + 999, #ready))) end
end
if refused then return take_out() end
return {now, accepted}
