local removed = {}
for i = 1, #ARGV do
    removed[i] = redis.call('HDEL', KEYS[1], ARGV[i])
    redis.call('ZREM', KEYS[2], ARGV[i])
end
return removed
