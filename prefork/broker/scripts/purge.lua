-- Delete up to n messages from one place of a queue.
-- KEYS  1 messages  2 state  3 stats  4 leases  5 the place: pending, ranked, scheduled or dead
-- ARGV  1 n  2 prefix of result keys
-- Returns  how many were there
redis.call('ZREM', KEYS[4], '') -- lets a server that is out of memory do the rest
local ids
if redis.call('TYPE', KEYS[5]).ok == 'list' then
  ids = redis.call('LPOP', KEYS[5], ARGV[1]) or {}
else
  ids = redis.call('ZRANGE', KEYS[5], 0, tonumber(ARGV[1]) - 1)
  if #ids > 0 then redis.call('ZREM', KEYS[5], unpack(ids)) end
end
if #ids > 0 then
  local deleted = 0
  for _, id in ipairs(ids) do
    if redis.call('HSTRLEN', KEYS[1], id) > #'0 cancelled' then deleted = deleted + 1 end -- else a trace of one
  end
  redis.call('HDEL', KEYS[1], unpack(ids))
  redis.call('HDEL', KEYS[2], unpack(ids))
  redis.call('HINCRBY', KEYS[3], 'deleted', deleted)
  for i, id in ipairs(ids) do ids[i] = ARGV[2] .. id end
  redis.call('UNLINK', unpack(ids))
end
return #ids
