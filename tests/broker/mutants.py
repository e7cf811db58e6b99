"""By hand: break each script in ways that are easily written, and see whether the random scripts notice.

python -m tests.broker.mutants [name of a script …]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import redis

from prefork.broker import verbs
from tests.broker import test_places as places
from tests.conftest import Server

EXAMPLES = 400
FENCE = "if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then"
# script -> (what is there, what stands there instead); the first one that is found is replaced
MUTANTS: dict[str, list[tuple[str, str]]] = {
    "enqueue": [
        ("redis.call('HSETNX', KEYS[1], id, message)", "redis.call('HSET', KEYS[1], id, message)"),
        ("not finished and ", ""),
        ("due < tonumber(first[2])", "due > tonumber(first[2])"),
        ("if woken then", "if false then"),
        ("-tonumber(priority)", "tonumber(priority)"),
        ("redis.call('RPUSH', KEYS[2], unpack(ready)) end\nif", "redis.call('LPUSH', KEYS[2], unpack(ready)) end\nif"),
        ("accepted = accepted + 1", ""),
        ("if due > now then", "if due > 0 then"),
        ("elseif priority == '0' then", "elseif true then"),
    ],
    "claim": [
        (FENCE, "if false then"),
        ("if #due > 0 then\n  redis.call('ZREM', KEYS[7], unpack(due))", "if #due > 0 then"),
        ("redis.call('RPUSH', KEYS[5], id)", "redis.call('LPUSH', KEYS[5], id)"),
        ("if redis.call('EXISTS', KEYS[9]) == 1", "if false"),
        ("redis.call('LPOP', KEYS[5]", "redis.call('RPOP', KEYS[5]"),
        ("      redis.call('HDEL', KEYS[3], taken[i])\n", ""),
        ("take_ranked('-inf', '(0')", "take_ranked('(0', '+inf')"),
        ("if ranked and #ids < n then take_ranked('(0', '+inf') end", ""),
        ("  redis.call('ZADD', KEYS[8], 0, '0') -- for another idle master", ""),
        ("  redis.call('DEL', KEYS[8])", ""),
        ("exact + i", "exact"),
        ("redis.call('ZADD', KEYS[6], -priority, id)", "redis.call('RPUSH', KEYS[5], id)"),
        ("return #ids < n", "return false"),
        ("if message == '0 cancelled' then", "if false then"),
    ],
    "settle": [
        (FENCE, "if false then"),
        ("if claimed then held", "if true then held"),
        ("if redis.call('ZREM', KEYS[2], id) == 0 then return false end", "redis.call('ZREM', KEYS[2], id)"),
        ("    if redis.call('EXISTS', KEYS[4]) == 1 then redis.call('HDEL', KEYS[4], unpack(held)) end\n", ""),
        ("elseif front then", "elseif false then"),
        ("  woken = true\n  if priority", "  if priority"),
        ("  woken = woken or not first or due < tonumber(first)", ""),
        ("if ARGV[i + 4] == '1' then processed", "if true then processed"),
        ("        redis.call('HSET', KEYS[4], id, ARGV[i + 3])\n", ""),
        ("if redis.call('ZSCORE', KEYS[2], id) then redis.call('HSET'", "if true then redis.call('HSET'"),
        ("    if redis.call('ZSCORE', KEYS[2], id)\n      and redis", "    if redis"),
        ("redis.call('HSETNX', KEYS[3], child", "redis.call('HSET', KEYS[3], child"),
        ("if #gone < over then", "if false then"),
        ("    redis.call('HDEL', KEYS[3], unpack(gone))\n", ""),
        ("math.min(over, 100) - 1", "math.min(over, 100)"),
        ("      redis.call('HDEL', KEYS[4], id)\n      finish", "      finish"),
        ("if ttl ~= '0' then", "if false then"),
        ("'processed', processed)", "'processed', settled)"),
        ("if delay > 0 then", "if false then"),
        ("record, 'PX', ttl)", "record)"),
        ("      redis.call('HINCRBY', KEYS[9], ARGV[i + 4], 1)\n", ""),
        ("not is_cancelled(id) and priority_of(id)", "priority_of(id)"),
        ("  redis.call('DEL', ARGV[4] .. id)\n", ""),
        ("  redis.call('HINCRBY', KEYS[9], 'cancelled', 1)\n  over", "  over"),
    ],
    "restore": [
        ("tonumber(ends) > time", "tonumber(ends) < time"),
        ("if ARGV[2] == 'expired' then", "if false then"),
        ("kept[ARGV[i]] = true", ""),
        ("  redis.call('ZREM', KEYS[1], ARGV[1])\n", ""),
        ("    redis.call('ZREM', KEYS[2], id)\n", ""),
        ("for i = #held, 1, -1 do", "for i = 1, #held do"),
        ("redis.call('LPUSH', KEYS[4], id)", "redis.call('RPUSH', KEYS[4], id)"),
        ("redis.call('ZADD', KEYS[5], -priority, id)", "redis.call('LPUSH', KEYS[4], id)"),
        ("if moved > buried then", "if false then"),
        (">= tonumber(ARGV[3])", "> tonumber(ARGV[3])"),
        ("ARGV[2] == 'gone' or ", ""),
        ("  redis.call('HDEL', KEYS[7], id)\n", ""),
        ("  redis.call('PEXPIRE', KEYS[7], 604800000)\n", ""),
        ("  redis.call('HSET', KEYS[8], id, cjson.encode(state))\n", ""),
        ("if not known or type", "if known or type"),
        ("or is_cancelled(id)", ""),
        ("  redis.call('DEL', ARGV[6] .. id)\n", ""),
        ("  redis.call('HINCRBY', KEYS[10], 'cancelled', 1)\n", ""),
    ],
    "beat": [
        ("if not held then return", "if false then return"),
        ("now + tonumber(ARGV[2])", "now"),
        ("if waiting > 0 and redis.call('EXISTS', KEYS[5]) == 1 then waiting = 0 end", ""),
        ("'EXISTS', KEYS[2], KEYS[3]", "'EXISTS', KEYS[2]"),
        ("'ZRANGE', KEYS[4], 0, 0", "'ZRANGE', KEYS[4], -1, -1"),
    ],
    "cancel": [
        ("or message == '0 cancelled' ", ""),
        (" or redis.call('ZSCORE', KEYS[6], id)", ""),
        ("if redis.call('ZSCORE', ARGV[2] .. worker, id) then", "if false then"),
        ("if ARGV[7] == '' then", "if true then"),
        ("    redis.call('PEXPIRE', ARGV[7] .. worker, 60000)\n", ""),
        ("redis.call('HDEL', KEYS[2], id)\n", ""),
        ("redis.call('LREM', KEYS[8], 1, id) == 0", "false"),
        (" + redis.call('ZREM', KEYS[5], id) == 0", " == 0"),
        ("if stands then", "if false then"),
        ("    redis.call('SET', ARGV[8], ARGV[5]", "    redis.call('SET', ARGV[8], '0'"),
        ("redis.call('HINCRBY', KEYS[7], 'cancelled', 1)\n", ""),
        ("if ARGV[5] ~= '0' then", "if false then"),
    ],
    "ask": [
        ("if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then", "if false then"),
        ("redis.call('PEXPIRE', KEYS[2], 60000)\n", ""),
    ],
    "pause": [
        ("'SETNX'", "'GET'"),
        ("redis.call('DEL', KEYS[1])", "redis.call('EXISTS', KEYS[1])"),
        ("redis.call('ZADD', KEYS[2], 0, '0')\n", ""),
    ],
    "revive": [
        ("redis.call('ZREM', KEYS[5], id) == 1", "true"),
        ("redis.call('HSET', KEYS[2], unpack(states))", ""),
        ('"crashes":0,', ""),
        ("  redis.call('UNLINK', unpack(said))\n", ""),
        ("  redis.call('HDEL', KEYS[7], unpack(revived))\n", ""),
        ("redis.call('RPUSH'", "redis.call('LPUSH'"),
        ("  redis.call('ZADD', KEYS[6], 0, '0')\n", ""),
        ("looked = looked + 1", "looked = 1"),
    ],
    "delete": [
        ("if redis.call('ZSCORE', ARGV[2] .. worker, id) then", "if false then"),
        ("redis.call('HDEL', KEYS[2], id)\n", ""),
        (" + redis.call('ZREM', KEYS[6], id)", ""),
        ("placed = redis.call('LREM', KEYS[3], 1, id)", "placed = 1"),
        ("or message == '0 cancelled' ", ""),
        ("redis.call('HINCRBY', KEYS[9], 'deleted', 1)\n", ""),
        ("redis.call('DEL', KEYS[8])", "redis.call('EXISTS', KEYS[8])"),
    ],
    "purge": [
        ("  redis.call('HDEL', KEYS[1], unpack(ids))\n", ""),
        ("  redis.call('HDEL', KEYS[2], unpack(ids))\n", ""),
        ("  redis.call('UNLINK', unpack(ids))\n", ""),
        ("tonumber(ARGV[1]) - 1)", "tonumber(ARGV[1]))"),
        ("redis.call('HINCRBY'", "redis.call('HLEN', KEYS[3]) -- "),
        ("  if #ids > 0 then redis.call('ZREM', KEYS[5], unpack(ids)) end\n", ""),
    ],
}  # fmt: skip


def broken(wanted: list[str]) -> Iterator[tuple[str, str, str]]:
    """Script, what is replaced, and by what; exits if a text is not there any more."""
    for name in wanted or MUTANTS:
        for old, new in MUTANTS[name]:
            if old.encode() not in verbs.script(name).text:
                sys.exit(f"mutants: {name}.lua has no {old!r}: give it another mutant")
            yield name, old, new


def survives(client: redis.Redis, name: str, old: str, new: str) -> bool:
    """Whether no run of the machine finds it."""

    def edit(verb: str, text: bytes) -> bytes:
        return text.replace(old.encode(), new.encode(), 1) if verb == name else text

    for far in (False, True):
        try:
            places.run(client, EXAMPLES, workers=3, far=far, edit=edit)
        except BaseException as found:  # also the groups of hypothesis
            if isinstance(found, KeyboardInterrupt):
                raise
            return False
    return True


def main(wanted: list[str]) -> int:
    """-> 1 if any survives"""
    server = Server("redis-server")
    survivors = total = 0
    try:
        for name, old, new in broken(wanted):
            total += 1
            if survives(server.client, name, old, new):
                survivors += 1
                print(f"SURVIVES {name}: {old!r} -> {new!r}", flush=True)
    finally:
        server.close()
    print(f"{total} mutants, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
