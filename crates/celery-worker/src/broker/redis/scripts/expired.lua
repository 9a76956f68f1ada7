local time = redis.call('TIME')
local before = time[1] + time[2] / 1000000 - ARGV[1]
return redis.call('ZREVRANGEBYSCORE', KEYS[1], string.format('%.6f', before), '-inf',
    'WITHSCORES', 'LIMIT', 0, ARGV[2])
