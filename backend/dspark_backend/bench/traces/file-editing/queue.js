// A queue of jobs: the urgent ones first, then in order of arrival.
class Job {
  constructor(name, urgency, seconds) {
    this.name = name;
    this.urgency = urgency;
    this.seconds = seconds;
    this.started = null;
    this.ended = null;
  }
}

class Queue {
  constructor(workers) {
    this.workers = workers;
    this.waiting = [];
    this.running = [];
    this.done = [];
  }

  add(job) {
    let place = this.waiting.length;
    while (place > 0 && this.waiting[place - 1].urgency < job.urgency) {
      place -= 1;
    }
    this.waiting.splice(place, 0, job);
  }

  start(now) {
    while (this.running.length < this.workers && this.waiting.length > 0) {
      const job = this.waiting.shift();
      job.started = now;
      this.running.push(job);
    }
  }

  finish(now) {
    const still = [];
    for (const job of this.running) {
      if (now - job.started >= job.seconds) {
        job.ended = now;
        this.done.push(job);
      } else {
        still.push(job);
      }
    }
    this.running = still;
  }

  get length() {
    return this.waiting.length + this.running.length;
  }
}
