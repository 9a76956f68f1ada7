local field, score, text = ARGV[1], ARGV[2], ARGV[3]
if redis.call('ZSCORE', KEYS[2], field) ~= score then
    return 0
end
redis.call('ZREM', KEYS[2], field)
if redis.call('HDEL', KEYS[1], field) == 0 then
    return 0
end
for i = 3, #KEYS do
    redis.call('RPUSH', KEYS[i], text)
end
return 1
