'use strict'

// A private DHT of four nodes on 127.0.0.1; fewer and two Node programs cannot reach each other.

const createTestnet = require('hyperdht/testnet')

createTestnet(4, { host: '127.0.0.1' }).then((testnet) => {
  const { host, port } = testnet.bootstrap[0]
  console.log(`dht node listening on ${host}:${port}`)
})
