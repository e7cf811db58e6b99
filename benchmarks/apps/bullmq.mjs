// Worker and producer of bullmq_app.py; tasks report as those of work.py do.
import fs from "node:fs";
import { createRequire } from "node:module";
import readline from "node:readline";

const { Queue, Worker } = createRequire(`${process.env.BENCH_MODULES}/`)("bullmq");
const { hostname, port } = new URL(process.env.BENCH_URL);
const connection = { host: hostname, port: Number(port), maxRetriesPerRequest: null };
const BATCH = 1000;

async function produce() {
  const queue = new Queue("bench", { connection });
  const opts = { removeOnComplete: true, removeOnFail: true };
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { name, rows, bulk } = JSON.parse(line);
    const begun = performance.now();
    if (bulk) {
      for (let at = 0; at < rows.length; at += BATCH) {
        await queue.addBulk(rows.slice(at, at + BATCH).map((data) => ({ name, data, opts })));
      }
    } else {
      for (const data of rows) await queue.add(name, data, opts);
    }
    console.log((performance.now() - begun) / 1000);
  }
  process.exit(0);
}

function work(concurrency) {
  const file = (kind, flags) => fs.openSync(`${process.env.BENCH_FOLDER}/${kind}.${process.pid}`, flags);
  const counter = file("count", "w+");
  const records = file("record", "a");
  const eight = Buffer.alloc(8);
  let count = 0n;
  const record = (first, second) => {
    const pair = Buffer.alloc(16);
    pair.writeBigUInt64LE(BigInt(first), 0);
    pair.writeBigUInt64LE(second, 8);
    fs.writeSync(records, pair);
  };
  const tasks = {
    noop() {
      eight.writeBigUInt64LE(++count);
      fs.writeSync(counter, eight, 0, 8, 0);
    },
    stamp([sent]) {
      record(sent, process.hrtime.bigint());
    },
    async nap([seconds]) {
      const begun = process.hrtime.bigint();
      await new Promise((done) => setTimeout(done, seconds * 1000));
      record(begun, process.hrtime.bigint());
    },
  };
  new Worker("bench", async (job) => tasks[job.name](job.data), { connection, concurrency });
}

if (process.argv[2] === "produce") await produce();
else work(Number(process.argv[3]));
