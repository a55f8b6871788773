//! Four worker processes share out five tasks: whoever is free takes the next.
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

/// What Python brings along.
mod multiprocessing {
    use std::error::Error;
    use std::fs::File;
    use std::io::{self, Read, Write};
    use std::{mem, panic};

    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use nix::libc::_exit;
    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork, getpid, getppid, pipe};

    /// Workers that read their tasks from one pipe: whoever is free takes the next.
    ///
    /// A task is written whole, as it is far shorter than `PIPE_BUF`, and read whole, as all have
    /// one length and the kernel lets one process at a time read. A pool that is dropped before its
    /// `join` kills its workers. If this process is killed, they end after their tasks, but idle ones
    /// only when what was forked after the pool has ended.
    pub struct Pool {
        tasks: Option<File>, // the write end, until `close`
        workers: Vec<Pid>,   // until they are reaped
    }

    /// The address of a function, which is the same in a fork of this program, and its argument.
    /// With the address 0 it is no task, but tells one worker to stop.
    type Task = [[u8; size_of::<usize>()]; 2];

    impl Pool {
        /// The caller must see to it that this process has a single thread: a lock that another one
        /// holds would never be released in a worker.
        pub fn new(processes: usize) -> Result<Self, Box<dyn Error>> {
            if processes == 0 {
                return Err("Number of processes must be at least 1".into());
            }
            let (reader, writer) = pipe().map_err(|error| format!("pipe: {error}"))?;
            for end in [&reader, &writer] {
                // A program that somebody runs would have it open, too.
                fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            }
            let mut pool = Pool {
                tasks: Some(writer.into()),
                workers: Vec::new(),
            };
            io::stdout().flush()?; // the workers would print what is left, too
            let parent = getpid();
            for _ in 0..processes {
                // SAFETY: the caller sees to it that this process has a single thread, so its child
                // may do whatever it may do itself.
                match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
                    ForkResult::Child => {
                        pool.tasks = None; // unused here; it would hold off the end-of-file
                        let ended = panic::catch_unwind(|| work(reader.into(), parent));
                        // SAFETY: `_exit` has no precondition. It runs nothing that is the parent's.
                        unsafe { _exit(i32::from(!matches!(ended, Ok(Ok(true))))) }
                    }
                    ForkResult::Parent { child } => pool.workers.push(child),
                }
            }
            Ok(pool) // `reader` closes, unused here; it would hide that no worker is left
        }

        /// Waits while the pipe is full; mostly it holds 4,096 tasks. `func` must be a part of the
        /// program, or of a library that was loaded before the pool was made.
        pub fn apply_async(&mut self, func: fn(usize), arg: usize) -> Result<(), Box<dyn Error>> {
            let tasks = self.tasks.as_mut().ok_or("Pool not running")?;
            let task: Task = [func as usize, arg].map(usize::to_ne_bytes);
            let _ = tasks.write_all(task.as_flattened()); // if no worker is left, `join` says why
            Ok(())
        }

        /// Waits while the pipe is full.
        pub fn close(&mut self) {
            if let Some(mut tasks) = self.tasks.take() {
                // The end-of-file may not come: what was forked later has this write end, too.
                for _ in &self.workers {
                    let _ = tasks.write_all(Task::default().as_flattened()); // as above
                }
            }
        }

        /// Fails if a worker was killed, or exited with a status other than 0: with 1, in the end, if
        /// one of its tasks panicked.
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            if self.tasks.is_some() {
                return Err("Pool is still running".into());
            }
            let ends: Vec<_> = self
                .workers
                .drain(..)
                .filter_map(|worker| wait(worker).err())
                .collect();
            if ends.is_empty() {
                return Ok(());
            }
            Err(ends.join(", ").into())
        }
    }

    impl Drop for Pool {
        fn drop(&mut self) {
            for &worker in &self.workers {
                // If it is not alive, its process id may by now be a stranger's.
                if waitpid(worker, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
                    let _ = kill(worker, Signal::SIGKILL);
                    let _ = wait(worker); // it was killed just now
                }
            }
        }
    }

    /// Runs tasks until this worker is to stop, or its parent has died. Returns whether none panicked.
    fn work(mut tasks: File, parent: Pid) -> Result<bool, Box<dyn Error>> {
        rand::rng().reseed()?; // or all workers may draw the same numbers
        let mut well = true;
        let mut task = Task::default();
        // A parent that has died may have left tasks before the end-of-file.
        while tasks.read_exact(task.as_flattened_mut()).is_ok() && getppid() == parent {
            let [address, arg] = task.map(usize::from_ne_bytes);
            if address == 0 {
                break;
            }
            // SAFETY: `apply_async` wrote the address of a `fn(usize)`. Its caller saw to it that the
            // function was there when this worker was forked, so it is here, too.
            let func = unsafe { mem::transmute::<*const (), fn(usize)>(address as *const ()) };
            well &= panic::catch_unwind(|| func(arg)).is_ok(); // it ends the task, not the worker
        }
        io::stdout().flush()?; // if it fails, status 1 tells
        Ok(well)
    }

    /// Waits until `worker` has ended, and reaps it. Fails unless it exited with status 0.
    fn wait(worker: Pid) -> Result<(), String> {
        loop {
            let end = match waitpid(worker, None) {
                Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
                Ok(WaitStatus::Exited(_, code)) => format!("exited with status {code}"),
                Ok(WaitStatus::Signaled(_, by, _)) => format!("was killed by {by}"),
                Ok(_) | Err(Errno::EINTR) => continue, // it has not ended yet
                Err(error) => format!("cannot be waited for: {error}"),
            };
            return Err(format!("worker {worker} {end}"));
        }
    }
}
