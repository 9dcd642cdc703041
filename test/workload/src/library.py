# SPDX-License-Identifier: Apache-2.0
#
# library.py SECONDS: keeps the interpreter and the C code of the standard library busy:
# json, re, hashlib (OpenSSL's assembly), zlib, sorting with a key, deep recursion.
import hashlib
import json
import re
import sys
import time
import zlib

data = {"list%d" % i: [{"a": j, "b": str(j) * 3, "c": [1.5 * j, None, True]} for j in range(30)] for i in range(20)}
word = re.compile(r"(\w+)-(\d+)|(?:[a-f]+[0-9]*)+x")
text = " ".join("word-%d abc%d" % (i, i) for i in range(2000))
block = bytes(range(256)) * 256


def depth(n):
    return sorted([n, 1, 2], key=lambda x: -x)[0] if n == 0 else 1 + depth(n - 1)


print("ready", flush=True)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    for _ in range(3):
        json.loads(json.dumps(data))
    word.findall(text)
    word.sub(lambda m: m.group(0).upper(), text)
    for name in ("md5", "sha1", "sha256", "sha512", "blake2b", "sha3_256"):
        h = hashlib.new(name)
        for _ in range(10):
            h.update(block)
    zlib.decompress(zlib.compress(block))
    for _ in range(50):
        depth(60)
