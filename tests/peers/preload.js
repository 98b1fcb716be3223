'use strict'

// Loaded with `node -r` before any Node peer: keeps it on this machine.
//
// The Node command line takes no bootstrap option, so its list is replaced here, by what
// HYPERSEAPORT_TEST_BOOTSTRAP says ("127.0.0.1:PORT", or "none" for a program that brings its own).
// As a second wall, a datagram to an address that is not this machine's ends the process.
//
// In the NAT laboratory (tests/support/laboratory.py) the wall is the network namespace, which has no
// way out; its mark is that the only device beside the loopback is named "laboratory". There, any
// IPv4 address may be the bootstrap node, and any may be sent to.

const dns = require('dns')
const os = require('os')

const devices = Object.keys(os.networkInterfaces()).filter((name) => name !== 'lo')
const laboratory = devices.length === 1 && devices[0] === 'laboratory'

const given = process.env.HYPERSEAPORT_TEST_BOOTSTRAP
const bootstrap = laboratory ? /^\d+\.\d+\.\d+\.\d+:\d+$/ : /^127\.0\.0\.1:\d+$/
if (!given || !(given === 'none' || bootstrap.test(given))) {
  throw new Error('HYPERSEAPORT_TEST_BOOTSTRAP must be 127.0.0.1:PORT or none')
}

const nodes = require('hyperdht/lib/constants').BOOTSTRAP_NODES
nodes.splice(0, nodes.length, ...(given === 'none' ? [] : [given]))
Object.freeze(nodes)

const own = new Set()
for (const addresses of Object.values(os.networkInterfaces())) {
  for (const { address } of addresses) own.add(address)
}

function guard (host) {
  if (laboratory || !host || own.has(host)) return // none means 127.0.0.1
  if (/^(127\.|::ffff:127\.|::1$)/.test(host)) return
  process.stderr.write(`preload: refused to send to ${host}\n`)
  process.exit(97)
}

function wrap (prototype, name, position) {
  const inner = prototype[name]
  if (typeof inner !== 'function') throw new Error(`preload: udx-native has no ${name} to guard`)
  prototype[name] = function (...args) {
    guard(args[position])
    return inner.apply(this, args)
  }
}

const Socket = require('udx-native/lib/socket').prototype
const Stream = require('udx-native/lib/stream').prototype
const UDX = require('udx-native/lib/udx').prototype
wrap(Socket, 'send', 2)
wrap(Socket, 'trySend', 2)
wrap(Stream, 'connect', 3)
wrap(UDX, 'lookup', 0)

dns.lookup = (host) => {
  process.stderr.write(`preload: refused to look up ${host}\n`)
  process.exit(97)
}
