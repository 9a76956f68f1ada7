-- KEYS: record   ARGV: field, text in place of the body
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry then
    return false
end
if #entry > 16384 then
    local is_json, parts = pcall(cjson.decode, entry)
    local message = is_json and type(parts) == 'table' and parts[1]
    if type(message) == 'table' and type(message.body) == 'string' then
        local from, to = body_range(entry, message.body)
        if from then
            return {string.sub(entry, 1, from - 1) .. ARGV[2] .. string.sub(entry, to + 1), from, to}
        end
    end
end
return {entry, 1, 0}
