// Rates: differences of totals over the last seconds.
//
// Processes report twice a second and the page asks once, so a single difference would jump;
// over a window of some seconds it does not. A total that falls belongs to a new process, and its
// history starts anew.

export class Rates {
  #window;
  #history = new Map();

  constructor(windowSeconds) {
    this.#window = windowSeconds;
  }

  // Notes what a total is now, at `seconds`.
  note(name, total, seconds) {
    let samples = this.#history.get(name);
    if (!samples || samples.at(-1).total > total) {
      samples = [];
      this.#history.set(name, samples);
    }
    samples.push({ total, seconds });
    while (samples.length > 2 && samples[1].seconds <= seconds - this.#window) samples.shift();
  }

  // Per second, or null as long as there is only one sample.
  rate(name) {
    const samples = this.#history.get(name);
    if (!samples || samples.length < 2) return null;
    const [first, last] = [samples[0], samples.at(-1)];
    return (last.total - first.total) / Math.max(last.seconds - first.seconds, 1e-3);
  }

  // The quotient of two totals' growth, as of seconds by steps; null where nothing has grown.
  ratio(over, under) {
    const [above, below] = [this.rate(over), this.rate(under)];
    return above === null || !below ? null : above / below;
  }

  // Forgets totals that were not noted at `seconds`: their processes have left.
  forgetOlder(seconds) {
    for (const [name, samples] of this.#history) {
      if (samples.at(-1).seconds < seconds) this.#history.delete(name);
    }
  }
}
