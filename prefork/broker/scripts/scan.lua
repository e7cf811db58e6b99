-- Look at some of what a hash or a sorted set holds.
-- KEYS  1 the hash or sorted set
-- ARGV  1 cursor  2 how many to look at  3 what it holds: "messages" | "states" | "counts" | "ids"
-- Returns  {next cursor, size of what was looked at in bytes, {ids}, {ids whose value looks damaged}}
local scan = ARGV[3] == 'ids' and 'ZSCAN' or 'HSCAN'
local reply = redis.call(scan, KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local ids, odd, size = {}, {}, 0
local headers = {}

local function is_json(text) return (pcall(cjson.decode, text)) end

local looks_well = {
  ids = function() return true end,
  counts = function(value) return string.match(value, '^%d+$') and #value < 16 end,
  states = function(value) return string.match(value, '^{.*}$') end,
  messages = function(value)
    if value == '0 cancelled' then return true end
    local header, body = string.match(value, '^1 %d+ %-?%d+ ({[^\n]*})\n(%[.*%])$')
    if not header then return false end
    if headers[header] == nil then headers[header] = is_json(header) end
    return headers[header] and (#body > 4096 or is_json(body)) -- large ones would take too long
  end,
}
looks_well = looks_well[ARGV[3]]
local found = reply[2]
for i = 1, #found, 2 do
  ids[#ids + 1] = found[i]
  size = size + #found[i + 1]
  if not looks_well(found[i + 1]) then odd[#odd + 1] = found[i] end
end
return {reply[1], size, ids, odd}
