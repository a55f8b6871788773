//! Four worker processes share out five tasks: whichever is free takes the next.
//!
//! The tutorial's section 三、进程池 (the process pool), `demo2/propool.py`.
//! Run it with `cargo run -p propool`.

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use multiprocessing::Pool;
use nix::unistd::getpid;

fn long_time_task(name: usize) {
    println!("Run task {name} ({})...", getpid());
    let start = Instant::now();
    thread::sleep(Duration::from_secs_f64(rand::random::<f64>() * 3.0));
    let end = Instant::now();
    println!(
        "Task {name} runs {:.2} seconds.",
        (end - start).as_secs_f64()
    );
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("Parent process {}.", getpid());
    let mut p = Pool::new(4)?;
    for i in 0..5 {
        p.apply_async(long_time_task, i)?;
    }
    println!("Waiting for all subprocesses done...");
    p.close();
    p.join()?;
    println!("All subprocesses done.");
    Ok(())
}

/// The part of Python's `multiprocessing` that this program needs, and that its tests use.
pub mod multiprocessing {
    use std::error::Error;
    use std::io::{self, PipeReader, PipeWriter, Read, Write};
    use std::{mem, panic};

    use nix::errno::Errno;
    use nix::libc::_exit;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};

    /// Worker processes that read tasks from one pipe; whichever is free takes the next.
    ///
    /// A pool that is dropped without `join` is not waited for, as with std's `Child`: its workers
    /// do the queued tasks and end. When the parent has ended, each worker ends after the task that
    /// it is in or waits for, and queued tasks are lost. A worker that waits for a task ends once
    /// no process holds the write end of the pipe; each process that was forked after the pool
    /// holds it.
    pub struct Pool {
        tasks: Option<PipeWriter>, // `None` once closed
        workers: Vec<Pid>,         // empty once they have been waited for
    }

    /// The address of a function, which is the same in every fork of a program, and the argument
    /// for the call. The address 0 tells the worker that reads it to stop.
    ///
    /// A task is written in one piece, since it is shorter than `PIPE_BUF`, and read in one piece,
    /// since all have one length and the kernel lets one process at a time read from a pipe.
    type Task = [[u8; size_of::<usize>()]; 2];

    impl Pool {
        /// Makes a pool of `processes` workers. Fails if `processes` is 0, if stdout cannot be
        /// flushed, or if no pipe or process can be made.
        ///
        /// Call this only while the calling process has one thread: fork copies that thread alone,
        /// so a lock that another thread holds stays locked in the workers for ever. (Strictly an
        /// `unsafe fn`; it is not one, so that `Pool::new(4)?` reads like Python.)
        pub fn new(processes: usize) -> Result<Self, Box<dyn Error>> {
            if processes == 0 {
                return Err("Number of processes must be at least 1".into());
            }
            let (read_end, write_end) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
            let mut pool = Pool {
                tasks: Some(write_end),
                workers: Vec::new(),
            };
            // Otherwise the workers print what is still buffered as well.
            io::stdout().flush().map_err(|e| format!("stdout: {e}"))?;
            let parent = getpid();
            for _ in 0..processes {
                // SAFETY: the caller sees to it that this process has one thread, so the worker is
                // not limited to async-signal-safe functions.
                match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
                    ForkResult::Child => {
                        // As long as a worker held the write end, it would never see end-of-file.
                        pool.tasks = None;
                        let ended = panic::catch_unwind(|| work(read_end, parent));
                        let ok = matches!(ended, Ok(true));
                        let flushed = io::stdout().flush().is_ok(); // since `_exit` does not flush
                        // SAFETY: `_exit` can always be called; unlike `exit`, it skips exit
                        // handlers.
                        unsafe { _exit(if ok && flushed { 0 } else { 1 }) }
                    }
                    ForkResult::Parent { child } => pool.workers.push(child),
                }
            }
            Ok(pool) // `read_end` closes: as long as the parent held it, no write would fail
        }

        /// Queues a task for the workers: the call `func(arg)`. Waits while the pipe is full, on
        /// most systems at 4,096 tasks. Fails after `close`, and if no worker is left, nor a
        /// process that a task has forked.
        ///
        /// `func` must be in the program, or in a library that was loaded before the pool was made.
        pub fn apply_async(&mut self, func: fn(usize), arg: usize) -> Result<(), Box<dyn Error>> {
            let tasks = self.tasks.as_mut().ok_or("Pool not running")?;
            let task: Task = [func as usize, arg].map(usize::to_ne_bytes);
            // A write fails only if no process holds the read end.
            let written = tasks.write_all(task.as_flattened());
            written.map_err(|_| "no worker is left".into())
        }

        /// Tells the workers to stop after the queued tasks; no more tasks can be queued
        /// afterwards. Waits while the pipe is full.
        pub fn close(&mut self) {
            if let Some(mut tasks) = self.tasks.take() {
                // It is not enough to close this end: a process forked later holds it as well.
                for _ in &self.workers {
                    // A write fails if no worker is left, and `join` says why none is.
                    let _ = tasks.write_all(Task::default().as_flattened());
                }
            }
        }

        /// Waits for all workers to end. Fails before `close`. Fails if a worker's exit status is
        /// not 0, and names each such worker: 0 means that it was told to stop and that none of its
        /// tasks panicked. (A task that calls `exit(0)` gives its worker the same status.)
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            if self.tasks.is_some() {
                return Err("Pool is still running".into());
            }
            let results = self.workers.drain(..).map(wait);
            let failures: Vec<String> = results.filter_map(Result::err).collect();
            if failures.is_empty() {
                return Ok(());
            }
            Err(failures.join(", ").into())
        }
    }

    /// Runs tasks. Returns true if this worker was told to stop and none of its tasks panicked.
    fn work(mut tasks: PipeReader, parent: Pid) -> bool {
        // Otherwise the workers may all draw the same numbers.
        rand::rng().reseed().expect("cannot reseed");
        let ids = (getpid(), parent);
        let mut ok = true;
        let mut task = Task::default();
        // A process that a task has forked takes no task when it returns from that task, nor does a
        // worker whose parent has ended.
        while (getpid(), getppid()) == ids && tasks.read_exact(task.as_flattened_mut()).is_ok() {
            let [address, arg] = task.map(usize::from_ne_bytes);
            if address == 0 {
                return ok;
            }
            // SAFETY: `apply_async` wrote the address of a `fn(usize)`, and the caller of that sees
            // to it that the function was there when this worker was forked.
            let func = unsafe { mem::transmute::<*const (), fn(usize)>(address as *const ()) };
            if let Err(payload) = panic::catch_unwind(|| func(arg)) {
                ok = false;
                mem::forget(payload); // since its drop may panic again
            }
        }
        false
    }

    /// Waits for `worker` to end. Fails unless its exit status is 0.
    fn wait(worker: Pid) -> Result<(), String> {
        loop {
            let failure = match waitpid(worker, None) {
                Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
                Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
                Ok(_) | Err(Errno::EINTR) => continue, // the worker has not ended yet
                Err(e) => format!("cannot be waited for: {e}"),
            };
            return Err(format!("worker {worker} {failure}"));
        }
    }
}
