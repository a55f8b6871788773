//! One process puts values into a queue, and another one gets them out.
//!
//! The tutorial's section 五、进程间通信 (communication between processes), `demo2/commu.py`.
//! Run it with `cargo run -p commu`.

use std::error::Error;
use std::thread;
use std::time::Duration;

use multiprocessing::{Process, Queue};
use nix::unistd::getpid;

// The code that the writing process runs:
fn write(q: &Queue) -> Result<(), Box<dyn Error>> {
    println!("Process to write: {}", getpid());
    for value in ["A", "B", "C"] {
        println!("Put {value} to queue...");
        q.put(value)?;
        thread::sleep(Duration::from_secs_f64(rand::random::<f64>()));
    }
    Ok(())
}

// The code that the reading process runs:
fn read(q: &Queue) -> Result<(), Box<dyn Error>> {
    println!("Process to read: {}", getpid());
    loop {
        let value = q.get()?;
        println!("Get {value} from queue.");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The parent creates the Queue, and passes it to each child:
    let q = Queue::new()?;
    let mut pw = Process::new(write, &q);
    let mut pr = Process::new(read, &q);
    // Start the child pw, to write:
    pw.start()?;
    // Start the child pr, to read:
    pr.start()?;
    // Wait for pw to end:
    pw.join()?;
    q.join()?; // or pr may be terminated before it has got the last value, as it may in Python
    // The process pr is in an endless loop, so it cannot be waited for, only be terminated:
    pr.terminate()?;
    Ok(())
}

/// What Python brings along.
mod multiprocessing {
    use std::cell::Cell;
    use std::error::Error;
    use std::io::{self, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::panic::{self, AssertUnwindSafe};

    use nix::errno::Errno;
    use nix::libc::_exit;
    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};

    /// Carries texts in order from processes that put or join one at a time to a single reader.
    ///
    /// The first use in a process closes the end that it does not need. So start every process before
    /// this one uses the queue, and use it in all of them: as long as one has not, the others may wait
    /// for a reader or a writer that has died. Once a writer, or a process in `join`, was killed, the
    /// queue is of no use any more.
    pub struct Queue {
        read_end: Cell<Option<UnixStream>>, // open both ways, so that `get` can answer `join`
        write_end: Cell<Option<UnixStream>>,
    }

    /// Sent by `join` in place of the length of a value, which is never that large.
    const JOIN: [u8; size_of::<usize>()] = usize::MAX.to_ne_bytes();

    const CLOSED: &str = "this process has closed that end of the queue";
    // A transfer fails for no other reason than these:
    const NO_READER: &str = "the reader of the queue has ended";
    const NO_WRITER: &str = "all writers of the queue have ended";

    impl Queue {
        pub fn new() -> Result<Self, Box<dyn Error>> {
            let pair = UnixStream::pair().map_err(|error| format!("socketpair: {error}"))?;
            Ok(Queue {
                read_end: Cell::new(Some(pair.0)),
                write_end: Cell::new(Some(pair.1)),
            })
        }

        /// Waits while there is no room. Fails if the reader has ended.
        pub fn put(&self, value: &str) -> Result<(), Box<dyn Error>> {
            self.read_end.take(); // unused here; it would hide that the reader has died
            let mut end = self.write_end.take().ok_or(CLOSED)?;
            let message = [&value.len().to_ne_bytes(), value.as_bytes()].concat();
            end.write_all(&message).map_err(|_| NO_READER)?;
            self.write_end.set(Some(end));
            Ok(())
        }

        /// Fails if all writers have ended.
        pub fn get(&self) -> Result<String, Box<dyn Error>> {
            self.write_end.take(); // unused here; it would hold off the end-of-file
            let mut end = self.read_end.take().ok_or(CLOSED)?;
            let mut length = JOIN;
            end.read_exact(&mut length).map_err(|_| NO_WRITER)?;
            while length == JOIN {
                io::stdout().flush()?; // SIGTERM does not, and comes next
                end.write_all(&[0]).map_err(|_| NO_WRITER)?;
                end.read_exact(&mut length).map_err(|_| NO_WRITER)?;
            }
            let mut value = vec![0; usize::from_ne_bytes(length)];
            end.read_exact(&mut value).map_err(|_| NO_WRITER)?;
            self.read_end.set(Some(end));
            String::from_utf8(value).map_err(|error| error.utf8_error().into())
        }

        /// Waits until the reader has dealt with all values, and calls `get` once more. Fails if it
        /// has ended.
        pub fn join(&self) -> Result<(), Box<dyn Error>> {
            self.read_end.take(); // unused here; it would hide that the reader has died
            let mut end = self.write_end.take().ok_or(CLOSED)?;
            end.write_all(&JOIN).map_err(|_| NO_READER)?;
            end.read_exact(&mut [0]).map_err(|_| NO_READER)?;
            self.write_end.set(Some(end));
            Ok(())
        }
    }

    /// Terminates its child when it is dropped, as Python does with a daemonic one when it exits.
    pub struct Process<A> {
        target: fn(A) -> Result<(), Box<dyn Error>>,
        args: Option<A>,  // until its start
        pid: Option<Pid>, // from then on until it is reaped
    }

    impl<A> Process<A> {
        pub fn new(target: fn(A) -> Result<(), Box<dyn Error>>, args: A) -> Self {
            Process {
                target,
                args: Some(args),
                pid: None,
            }
        }

        /// The caller must see to it that this process has a single thread: a lock that another one
        /// holds would never be released in the child.
        pub fn start(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_some(), "cannot start a process twice");
            io::stdout().flush()?; // the child would print what is left, too
            // SAFETY: the caller sees to it that this process has a single thread, so its child may
            // do whatever it may do itself.
            match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
                ForkResult::Child => {
                    let ended = panic::catch_unwind(AssertUnwindSafe(|| {
                        rand::rng().reseed()?; // or it may draw the same numbers as its parent
                        self.args.take().map_or(Ok(()), self.target)
                    }));
                    let flushed = io::stdout().flush().map_err(Into::into);
                    let ended = ended.map(|result| result.and(flushed));
                    if let Ok(Err(error)) = &ended {
                        let _ = writeln!(io::stderr(), "Error: {error}"); // or status 1 tells
                    }
                    // SAFETY: `_exit` has no precondition. It runs nothing that is the parent's.
                    unsafe { _exit(i32::from(!matches!(ended, Ok(Ok(()))))) }
                }
                ForkResult::Parent { child } => (self.pid, self.args) = (Some(child), None),
            }
            Ok(())
        }

        /// Fails if the child failed, panicked, was killed or exited with a status other than 0.
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_none(), "can only join a started process");
            self.wait(None)
        }

        /// Ends the child by SIGTERM, and waits until it has ended. Fails, as `join` does, if the
        /// child had failed before.
        pub fn terminate(&mut self) -> Result<(), Box<dyn Error>> {
            self.wait(Some(Signal::SIGTERM))
        }

        /// Sends the `signal` first if the child is still alive; it may then be killed by that.
        fn wait(&mut self, mut signal: Option<Signal>) -> Result<(), Box<dyn Error>> {
            let mut sent = None;
            while let Some(pid) = self.pid {
                let end = match waitpid(pid, signal.map(|_| WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::StillAlive) => {
                        kill(pid, signal)?; // not reaped yet, so the pid is still its own
                        kill(pid, Signal::SIGCONT)?; // or a stopped child stays so
                        sent = signal.take();
                        continue;
                    }
                    Ok(WaitStatus::Exited(_, 0)) => Ok(()),
                    Ok(WaitStatus::Exited(_, code)) => Err(format!("exited with status {code}")),
                    Ok(WaitStatus::Signaled(_, by, _)) if Some(by) == sent => Ok(()),
                    Ok(WaitStatus::Signaled(_, by, _)) => Err(format!("was killed by {by}")),
                    Ok(_) | Err(Errno::EINTR) => continue, // it has not ended yet
                    Err(error) => Err(format!("cannot be waited for: {error}")),
                };
                self.pid = None;
                end.map_err(|end| format!("process {pid} {end}"))?;
            }
            Ok(())
        }
    }

    impl<A> Drop for Process<A> {
        fn drop(&mut self) {
            if let Err(error) = self.terminate() {
                let _ = writeln!(io::stderr(), "Error: {error}"); // there is nobody else to tell
            }
        }
    }
}
