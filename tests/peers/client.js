'use strict'

// Connects to the key that is its argument (64 hex digits), says in one line what comes of it, and
// sends back what it gets.

const DHT = require('hyperdht')

const begin = Date.now()
const socket = new DHT().connect(Buffer.from(process.argv[2], 'hex'))

socket.on('open', () => console.log('open'))
socket.on('data', (data) => socket.write(data))
socket.on('error', (error) => {
  console.log(`error ${error.code} after ${Date.now() - begin} ms`)
  process.exit()
})
