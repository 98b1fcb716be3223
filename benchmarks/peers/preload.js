'use strict'

// Loaded with `node -r` before a Node peer that runs in a network namespace of the benchmark: makes
// HYPERSEAPORT_BENCH_BOOTSTRAP ("10.77.0.1:PORT", or "none") its only bootstrap node. Nothing else
// can be reached from there, as the namespace has one link and no route.

const os = require('os')

const given = process.env.HYPERSEAPORT_BENCH_BOOTSTRAP
if (!given || !(given === 'none' || /^10\.77\.0\.1:\d+$/.test(given))) {
  throw new Error('HYPERSEAPORT_BENCH_BOOTSTRAP must be 10.77.0.1:PORT or none')
}
for (const addresses of Object.values(os.networkInterfaces())) {
  for (const { address } of addresses) {
    if (!/^(127\.|10\.77\.0\.|::1$|fe80:)/.test(address)) throw new Error('not in a namespace')
  }
}

const nodes = require('hyperdht/lib/constants').BOOTSTRAP_NODES
nodes.splice(0, nodes.length, ...(given === 'none' ? [] : [given]))
Object.freeze(nodes)
