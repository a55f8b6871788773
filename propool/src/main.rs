//! Four worker processes share five tasks: whichever is free takes the next.
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

/// The part of Python's `multiprocessing` that this program needs; `pub` for its tests.
pub mod multiprocessing {
    use std::error::Error;
    use std::io::{self, PipeReader, PipeWriter, Read, Write};
    use std::{mem, panic};

    use nix::errno::Errno;
    use nix::libc::_exit;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};

    /// Worker processes that read tasks from one pipe; whichever is free takes the next. Only the
    /// process that made a pool may call its methods.
    ///
    /// A pool that is dropped without `join` is not waited for, as with std's `Child`: its workers
    /// do the queued tasks, then end. A worker that sees that its parent has ended begins no task,
    /// and ends; the queued tasks are lost. In both cases, without `close`, an idle worker ends
    /// only after all processes that were forked after the pool, since they hold the pipe's write
    /// end too.
    #[derive(Debug)]
    pub struct Pool {
        tasks: Option<PipeWriter>, // `None` once closed
        workers: Vec<Pid>,         // empty once they have been waited for
    }

    /// The address of a function, which is the same in the parent and its workers, and an argument
    /// for it. The address 0 tells the worker that reads it to stop.
    ///
    /// A task is written and read in one piece: all have one length, less than `PIPE_BUF`, and the
    /// kernel lets one process at a time read from a pipe.
    type Task = [[u8; size_of::<usize>()]; 2];

    /// The exit status of a worker that was told to stop, whose tasks did not panic, and whose
    /// output was flushed. It is not 0, since a task that calls `exit(0)`, or `exec` of a program
    /// that succeeds, ends its worker with 0. No common program exits with 118.
    const DONE: i32 = 118;

    impl Pool {
        /// Makes a pool of `processes` workers. Fails if `processes` is 0, if stdout cannot be
        /// flushed, or if the pipe or one of the processes cannot be made; then no worker is left.
        ///
        /// Call this only while the process has one thread: fork copies no other. (`new` ought to
        /// be an `unsafe fn`; it is not, to read like Python's.) A lock that the caller holds stays
        /// locked in the workers. Make an async runtime only in a task.
        pub fn new(processes: usize) -> Result<Self, Box<dyn Error>> {
            if processes == 0 {
                return Err("Number of processes must be at least 1".into());
            }
            let (read_end, write_end) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
            let mut pool = Pool {
                tasks: Some(write_end),
                workers: Vec::new(),
            };
            // Without this, all processes would print what is still buffered.
            io::stdout().flush().map_err(|e| format!("stdout: {e}"))?;
            let parent = getpid(); // a worker's `getppid` may already name a new parent
            for _ in 0..processes {
                // SAFETY: the caller has one thread, so the worker may call any function.
                match unsafe { fork() } {
                    Ok(ForkResult::Child) => {
                        pool.tasks = None; // so that the worker can see end-of-file
                        // `read_end` may be moved in this loop, since `_exit` does not return.
                        let ended = panic::catch_unwind(|| work(read_end, parent));
                        let ok = matches!(ended, Ok(true));
                        let flushed = io::stdout().flush().is_ok(); // since `_exit` does not flush
                        // SAFETY: `_exit` can always be called; it skips the exit handlers.
                        unsafe { _exit(if ok && flushed { DONE } else { 1 }) }
                    }
                    Ok(ForkResult::Parent { child }) => pool.workers.push(child),
                    Err(e) => {
                        pool.close();
                        let _ = pool.join(); // the error to report is `e`
                        return Err(format!("fork: {e}").into());
                    }
                }
            }
            Ok(pool) // closes `read_end`, so that a write fails when no worker is left
        }

        /// Queues a task for the workers: the call `func(arg)`. Waits while the pipe is full, on
        /// most systems at 4,096 tasks. Fails (Python: ValueError) after `close`. Fails once all
        /// workers, and all processes forked by tasks, have ended.
        ///
        /// `func` must be in the program, or in a library that was loaded before the pool was made.
        /// (This ought to be an `unsafe fn` as well; it is not, for the same reason as `new`.)
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
                // Closing the pipe is not enough: a process forked later has its write end too.
                for _ in &self.workers {
                    // A write fails if no worker is left; `join` says how each has ended.
                    let _ = tasks.write_all(Task::default().as_flattened());
                }
            }
        }

        /// Waits for all workers to end; a second call returns `Ok`. Fails before `close`. Fails if
        /// a task panicked, or if a worker was killed (by a panic, with `panic = "abort"`), ended
        /// before it was told to stop, could not flush stdout or has an unknown exit status: the
        /// error says which workers, and how each ended. (A task's `exit(118)` is not noticed.)
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            if self.tasks.is_some() {
                return Err("Pool is still running".into());
            }
            let failures: Vec<String> = self.workers.drain(..).filter_map(wait).collect();
            if failures.is_empty() {
                return Ok(());
            }
            Err(failures.join(", ").into())
        }
    }

    /// Runs tasks. Returns true if this worker was told to stop and none of its tasks panicked.
    fn work(mut tasks: PipeReader, parent: Pid) -> bool {
        // Without this, all workers may draw the same numbers.
        rand::rng().reseed().expect("cannot reseed");
        // A process that a task has forked returns here too. It must run no task, not even when the
        // worker has ended and `parent` has become its parent: so both ids must be as at the start.
        let ids = (getpid(), parent);
        let may_run = || (getpid(), getppid()) == ids;
        let mut ok = true;
        let mut task = Task::default();
        // The parent may end during a task: then a read would wait for ever if a process that was
        // forked later holds the write end. The parent may also end during the read.
        while may_run() && tasks.read_exact(task.as_flattened_mut()).is_ok() && may_run() {
            let [address, arg] = task.map(usize::from_ne_bytes);
            if address == 0 {
                return ok;
            }
            // SAFETY: `apply_async` wrote the address of a `fn(usize)`, and its caller ensures that
            // the function was loaded before the pool was made.
            let func = unsafe { mem::transmute::<*const (), fn(usize)>(address as *const ()) };
            let ended = panic::catch_unwind(|| func(arg));
            ok &= ended.is_ok();
            mem::forget(ended); // since a panic's payload may panic again in its drop
        }
        false
    }

    /// Waits for `worker` to end. Returns how it failed, or `None` if it exited with `DONE`.
    fn wait(worker: Pid) -> Option<String> {
        loop {
            let failure = match waitpid(worker, None) {
                Ok(WaitStatus::Exited(_, DONE)) => return None,
                Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
                Ok(_) | Err(Errno::EINTR) => continue, // the worker has not ended yet
                Err(e) => format!("has an unknown exit status: {e}"),
            };
            return Some(format!("worker {worker} {failure}"));
        }
    }
}
