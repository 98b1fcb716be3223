'use strict'

// A blind relay, and a pair of programs that name one, which the Node command line cannot:
//
//   blind_relay.js relay                     prints "relay KEY"
//   blind_relay.js service PORT [RELAY]      in front of a TCP port; prints "started p2p service on KEY"
//   blind_relay.js proxy PORT KEY RELAY      a TCP listener; each connection goes to KEY, through RELAY
//                                            until the two have reached each other; prints "ready"
//
// RELAY may be "none", for one whose other end names the relay. With "only" as the last argument of
// both ends, they never reach each other. The pair does what the Node command line does with each
// connection, without a registry.

const net = require('net')
const DHT = require('hyperdht')

const [role, port, ...rest] = process.argv.slice(2)
const only = rest.at(-1) === 'only'
// Who looks whether others reach it finds that all do, on one machine.
const node = new DHT({ quickFirewall: !only })

function join (one, other) {
  one.on('error', () => other.destroy())
  other.on('error', () => one.destroy())
  one.on('close', () => other.destroy())
  other.on('close', () => one.destroy())
  one.pipe(other).pipe(one)
}

function relayThrough (key) {
  return key && key !== 'none' ? { relayThrough: Buffer.from(key, 'hex') } : {}
}

async function serve (word, onConnection, options = {}) {
  const server = node.createServer({ reusableSocket: true, ...options }, onConnection)
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
    }, { ...relayThrough(rest[0]), ...(only && { holepunch: false }) })
  },
  async proxy () {
    await node.fullyBootstrapped()
    const [key, relay] = rest
    const options = { reusableSocket: true, ...relayThrough(relay) }
    if (only) Object.assign(options, { localConnection: false })
    const listener = net.createServer({ allowHalfOpen: true }, (connection) => {
      join(connection, node.connect(Buffer.from(key, 'hex'), options))
    })
    listener.listen(Number(port), () => console.log('ready'))
  }
}

roles[role]()
