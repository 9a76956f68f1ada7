local time = redis.call('TIME')

-- Each later one is a microsecond younger, so that the order can be restored.
local function age(position)
    local micros = time[2] + position
    return string.format('%d.%06d', time[1] + math.floor(micros / 1000000), micros % 1000000)
end

local gone = {}
for i = 1, #ARGV do
    if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then
        redis.call('ZADD', KEYS[2], age(i), ARGV[i])
    else
        gone[#gone + 1] = ARGV[i]
    end
end
return gone
