-- KEYS: record   ARGV: limit of a body, limit with an eta; fields
local max_body, max_waiting = tonumber(ARGV[1]), tonumber(ARGV[2])

local function show(entry)
    local parts = cjson.decode(entry)
    return shorten(entry, parts, parts[1], max_body, max_waiting)
end

local found = {}
for i = 3, #ARGV do
    local entry = redis.call('HGET', KEYS[1], ARGV[i])
    local is_read, shown, omitted = pcall(show, entry)
    found[#found + 1] = is_read and shown or ''
    found[#found + 1] = is_read and omitted or 0
end
return found
