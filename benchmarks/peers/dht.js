'use strict'

// A private DHT of four nodes on the address of the first argument.

const createTestnet = require('hyperdht/testnet')

createTestnet(4, { host: process.argv[2] }).then((testnet) => {
  const { host, port } = testnet.bootstrap[0]
  console.log(`dht node listening on ${host}:${port}`)
})
