-- Some values of a hash: as many as fit into a quarter of a megabyte, one at least, so that no reply takes long.
-- KEYS  1 the hash
-- ARGV  fields of it
-- Returns  {value or nothing, …}: of the first fields, perhaps not of all
local found, size = {}, 0
for i, field in ipairs(ARGV) do
  found[i] = redis.call('HGET', KEYS[1], field)
  size = size + (found[i] and #found[i] or 0)
  if size > 262144 then break end
end
return found
