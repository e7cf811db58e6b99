-- Move what a worker holds back to the front of its queue, in the order in which it was claimed.
-- KEYS  1 leases  2 active of that worker  3 messages  4 pending  5 ranked  6 wake
-- ARGV  1 that worker
--       2 "gone": it has ended, take its lease away | "expired": the same, if its lease has ended
--         | "keep": it lives, and holds only the ids that follow
-- Returns  how many were moved; -1 if its lease has not ended
if ARGV[2] == 'expired' then
  local time = redis.call('TIME')
  local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
  if ends and tonumber(ends) > time[1] * 1000 + math.floor(time[2] / 1000) then return -1 end
end
-- A server that is out of memory refuses what needs more, unless the script has written before: what has ended must be
-- able to end, so that memory gets free.
redis.call('ZREM', KEYS[1], '')
local kept = {}
if ARGV[2] == 'keep' then
  for i = 3, #ARGV do kept[ARGV[i]] = true end
else
  redis.call('ZREM', KEYS[1], ARGV[1])
end
local held = redis.call('ZRANGE', KEYS[2], 0, -1)
local moved = 0
for i = #held, 1, -1 do
  local id = held[i]
  if not kept[id] then
    redis.call('ZREM', KEYS[2], id)
    local message = redis.call('HGET', KEYS[3], id)
    if message then
      local priority = tonumber(string.match(message, '^%d+ %d+ (%-?%d+) ')) or 0
      if priority == 0 then
        redis.call('LPUSH', KEYS[4], id)
      else
        redis.call('ZADD', KEYS[5], -priority, id)
      end
      moved = moved + 1
    end
  end
end
if moved > 0 then redis.call('ZADD', KEYS[6], 0, '0') end
return moved
