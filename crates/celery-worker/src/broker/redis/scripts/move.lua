local field, push, text = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HDEL', KEYS[1], field) == 0 then
    return 0
end
redis.call('ZREM', KEYS[2], field)
redis.call(push, KEYS[3], text)
return 1
