// node-postgres with its pool: one host, since it has no multi-host. A name where there is one, else the first address.

'use strict'

const dns = require('node:dns')
const net = require('node:net')
const { Pool } = require('pg')

const env = process.env
const PACE_MS = Number(env.BENCH_PACE_MS || 0)
const PAUSE_MS = 100
// A worker that hangs does not keep the process: it ends this long after its input did.
const GRACE_MS = 1000

const [firstHost, firstPort] = (env.BENCH_HOSTS || '').split(',')[0].split(':')
const host = env.BENCH_NAME || firstHost
const port = Number(env.BENCH_NAME ? env.BENCH_PORT : firstPort)

// The name server of the test bed in place of the system's, which can only be set for the whole machine.
function lookup(name, options, done) {
  const resolver = new dns.Resolver({ timeout: 1000, tries: 2 })
  resolver.setServers([env.BENCH_DNS])
  resolver.resolve4(name, (error, addresses) => {
    if (error) return done(error)
    if (options.all) return done(null, addresses.map((address) => ({ address, family: 4 })))
    done(null, addresses[0], 4)
  })
}

function stream() {
  const socket = new net.Socket()
  if (!env.BENCH_DNS) return socket
  const connect = socket.connect
  socket.connect = (port, host) => connect.call(socket, { port, host, lookup })
  return socket
}

const pool = new Pool({
  host,
  port,
  user: env.BENCH_USER,
  password: env.BENCH_PASSWORD || undefined,
  database: env.BENCH_DATABASE,
  max: Number(env.BENCH_WORKERS),
  stream,
  keepAlive: true,
  connectionTimeoutMillis: 2000,
  query_timeout: 5000,
  idleTimeoutMillis: 0,
})
// Without a listener the loss of an idle connection ends the process.
pool.on('error', () => {})

let stop = false
const micros = () => Math.round((performance.timeOrigin + performance.now()) * 1000)
const say = (line) => process.stdout.write(`${line}\n`)
const pause = (millis) => new Promise((done) => setTimeout(done, millis))

async function work(worker) {
  for (let counter = 0; !stop; ) {
    const id = `${env.BENCH_PREFIX}-${worker}-${counter}`
    try {
      await pool.query(`INSERT INTO ${env.BENCH_TABLE} (id) VALUES ($1)`, [id])
      say(`ok ${micros()} ${worker} ${id}`)
      counter += 1
      if (PACE_MS) await pause(PACE_MS)
    } catch (error) {
      const text = `${error.code || error.name}: ${error.message}`.replace(/\s+/g, ' ').slice(0, 300)
      say(`err ${micros()} ${worker} ${id} ${text}`)
      await pause(PAUSE_MS)
    }
  }
}

async function main() {
  const workers = Number(env.BENCH_WORKERS)
  const held = await Promise.all(Array.from({ length: workers }, () => pool.connect()))
  held.forEach((client) => client.release())
  say('ready')
  process.stdin.resume()
  const ended = new Promise((done) => process.stdin.on('end', done))
  const all = Promise.all(Array.from({ length: workers }, (_, worker) => work(worker)))
  await ended
  stop = true
  const late = new Promise((done) => setTimeout(done, GRACE_MS))
  await Promise.race([all, late])
  process.exit(0)
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
