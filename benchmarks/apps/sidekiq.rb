# The worker's side of sidekiq_app.py; tasks report as those of work.py do.
require "sidekiq"

Sidekiq.configure_server do |config|
  config.redis = { url: ENV["BENCH_URL"] }
  config.logger.level = Logger::ERROR
end

class Bench
  include Sidekiq::Worker

  COUNTER = File.open("#{ENV["BENCH_FOLDER"]}/count.#{Process.pid}", "w+b")
  RECORDS = File.open("#{ENV["BENCH_FOLDER"]}/record.#{Process.pid}", "ab")
  LOCK = Mutex.new
  @@count = 0

  def perform(name, *args)
    case name
    when "noop"
      LOCK.synchronize { COUNTER.pwrite([@@count += 1].pack("Q<"), 0) }
    when "stamp"
      record(args[0], now)
    when "nap"
      begun = now
      sleep(args[0])
      record(begun, now)
    end
  end

  def now = Process.clock_gettime(Process::CLOCK_MONOTONIC, :nanosecond)

  def record(first, second) = RECORDS.syswrite([first, second].pack("Q<Q<"))
end
