-- KEYS: record, index, lists   ARGV: field, score; before, first and last byte of the entry, after
local field, score = ARGV[1], ARGV[2]
if redis.call('ZSCORE', KEYS[2], field) ~= score then
    return 0
end
redis.call('ZREM', KEYS[2], field)
local entry = redis.call('HGET', KEYS[1], field)
if not entry then
    return 0
end
redis.call('HDEL', KEYS[1], field)
local text = ARGV[3] .. string.sub(entry, tonumber(ARGV[4]), tonumber(ARGV[5])) .. ARGV[6]
for i = 3, #KEYS do
    redis.call('RPUSH', KEYS[i], text)
end
return 1
