-- KEYS: record, index, list   ARGV: field, command; before, first and last byte of the entry, after
local field, push = ARGV[1], ARGV[2]
local entry = redis.call('HGET', KEYS[1], field)
if not entry then
    return 0
end
redis.call('HDEL', KEYS[1], field)
redis.call('ZREM', KEYS[2], field)
redis.call(push, KEYS[3], ARGV[3] .. string.sub(entry, tonumber(ARGV[4]), tonumber(ARGV[5])) .. ARGV[6])
return 1
