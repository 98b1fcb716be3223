'use strict'

// A DHT node at a public address: `public_node.js HOST PORT`. With "none" for a bootstrap node it is
// one for others, which has no identity: nobody takes it into a table, stores with it or goes through
// it. Otherwise it serves for good.

const DHT = require('hyperdht')

const [host, port] = process.argv.slice(2)
const first = process.env.HYPERSEAPORT_TEST_BOOTSTRAP === 'none'
const node = new DHT({ port: Number(port), ephemeral: first, firewalled: false })

node.fullyBootstrapped().then(() => {
  console.log(`dht node listening on ${host}:${node.address().port}`)
})
