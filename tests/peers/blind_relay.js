'use strict'

// A blind relay, and a pair of programs that name one, which the Node command line cannot:
//
//   blind_relay.js relay                     prints "relay KEY"
//   blind_relay.js service PORT              in front of a TCP port; prints "started p2p service on KEY"
//   blind_relay.js proxy PORT KEY RELAY      a TCP listener; each connection goes to KEY, through RELAY
//                                            until the two have reached each other; prints "ready"
//
// The pair does what the Node command line does with each connection, without a registry.

const net = require('net')
const DHT = require('hyperdht')

const [role, port, key, through] = process.argv.slice(2)
const node = new DHT()

function join (one, other) {
  one.on('error', () => other.destroy())
  other.on('error', () => one.destroy())
  one.on('close', () => other.destroy())
  other.on('close', () => one.destroy())
  one.pipe(other).pipe(one)
}

async function serve (word, onConnection) {
  const server = node.createServer({ reusableSocket: true }, onConnection)
  await server.listen(DHT.keyPair())
  console.log(word, server.publicKey.toString('hex'))
}

const roles = {
  relay () {
    const { Server } = require('blind-relay')
    const relay = new Server({
      createStream: (options) => node.createRawStream({ ...options, framed: true })
    })
    return serve('relay', (connection) => {
      connection.on('error', () => {})
      relay.accept(connection, { id: connection.remotePublicKey }).on('error', () => {})
    })
  },
  service () {
    return serve('started p2p service on', (connection) => {
      join(connection, net.connect({ port: Number(port), host: '127.0.0.1', allowHalfOpen: true }))
    })
  },
  async proxy () {
    await node.fullyBootstrapped()
    const relayThrough = Buffer.from(through, 'hex')
    const listener = net.createServer({ allowHalfOpen: true }, (connection) => {
      join(connection, node.connect(Buffer.from(key, 'hex'), { relayThrough, reusableSocket: true }))
    })
    listener.listen(Number(port), () => console.log('ready'))
  }
}

roles[role]()
